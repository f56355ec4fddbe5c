"""Which chat messages are refused because a part of them would not be sent."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lbr.core.errors import InputError
from lbr.io.sources import items_of
from tests.io import read, refused, write

if TYPE_CHECKING:
    from pathlib import Path


class TestMessages:
    """Messages of a JSONL line or of a prompt from Python."""

    @pytest.mark.parametrize(
        ("message", "complaint"),
        [
            ('"a"', "expected message 2 to have the role .*, got: 'a'"),
            ('{"role":["user"],"content":"a"}', "expected message 2 to have the role .*, got: "),
            ('{"role":"function","content":"a"}', "expected message 2 to have the role .*, got: .*function"),
            ('{"role":"user"}', "expected the content of message 2 to be text or a list of parts, got: None"),
            ('{"role":"assistant","content":null}', "expected the content of message 2 to be text or a list"),
            ('{"role":"user","content":["a"]}', "expected the parts of message 2 to be text, or images like"),
            (
                '{"role":"user","content":"a","name":"bob"}',
                "lbr does not send these fields of message 2: 'name'",
            ),
            ('{"role":"user","content":[{"type":"file","file":{}}]}', "expected the parts .*, got: .*'file'"),
            (
                '{"role":"user","content":[{"type":"input_audio"}]}',
                "expected the parts .*, got: .*'input_audio'",
            ),
            (
                '{"role":"user","content":[{"type":"text","text":"a","cache_control":{"type":"x"}}]}',
                "lbr does not send these fields of the text part of message 2: 'cache_control'",
            ),
            (
                '{"role":"user","content":[{"type":"image_url","image_url":{"url":"pic.png"}}]}',
                "expected an image of message 2 to have an https:, http: or data: URL, got: 'pic.png'",
            ),
            (
                '{"role":"user","content":[{"type":"image_url","image_url":"file:///pic.png"}]}',
                "expected an image of message 2 to have an https:, http: or data: URL, got: 'file:///pic.png'",
            ),
            (
                '{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png,x"}}]}',
                "expected a base64 data: URL in message 2",
            ),
            (
                '{"role":"system","content":[{"type":"image_url","image_url":"https://x"}]}',
                "message 2 has an image; only messages of the user",
            ),
            (
                '{"role":"tool","content":"a","tool_call_id":"x"}',
                "the tool_call_id or name of message 2 is not of an earlier tool call: ",
            ),
            (
                '{"role":"assistant","tool_calls":{"id":"x"}}',
                "expected the tool calls of message 2 to be like",
            ),
            ('{"role":"assistant","tool_calls":[5]}', "expected the tool calls of message 2 to be like"),
            (
                '{"role":"assistant","tool_calls":[{"id":"x","type":"function","function":{"name":"f","arguments":"["}}]}',
                "expected the arguments of message 2 to be a JSON object in a string",
            ),
        ],
    )
    def test_messages_that_could_not_be_sent_whole_are_refused(
        self, tmp_path: Path, message: str, complaint: str
    ) -> None:
        """A part of a message that no model would get is refused with file and line, from Python too."""
        line = f'{{"messages":[{{"role":"user","content":"hi"}},{message}]}}'
        path = write(tmp_path, "in.jsonl", f'{{"prompt":"fine"}}\n{line}\n')
        refused(path, 2, complaint)
        with pytest.raises(InputError, match=complaint):
            list(items_of([json.loads(line)]))

    def test_a_dumped_reply_with_empty_fields_is_a_message(self, tmp_path: Path) -> None:
        """Fields that hold nothing, as clients dump them beside a reply, are no reason to refuse it."""
        reply = '{"role":"assistant","content":"a","refusal":null,"annotations":[],"tool_calls":null}'
        path = write(tmp_path, "in.jsonl", f'{{"messages":[{reply},{{"role":"user","content":"b"}}]}}\n')
        assert read(path)[0].prompt.messages is not None
