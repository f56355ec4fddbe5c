"""PostgreSQL URLs as people paste them: what is understood, what is refused, and what is never shown."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pytest

from lbr.core.errors import UsageError
from lbr.store.addresses import address_of, is_postgresql
from tests.support import Cli

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("postgresql://me@host/db", True),
        ("postgres://me@host/db", True),
        ("postgresql+asyncpg://me@host/db", True),
        ("POSTGRES://me@host/db", True),
        ("sqlite:///runs.db", False),
        ("runs.db", False),
        ("postgresql", False),
    ],
)
def test_kinds_are_told_by_their_scheme(url: str, kind: bool) -> None:
    """Every way to spell PostgreSQL's scheme means PostgreSQL; a path never does."""
    assert is_postgresql(url) is kind


@pytest.mark.parametrize(
    ("url", "password", "shown"),
    [
        ("postgresql://me:plain@host:5433/db", "plain", "postgresql://me@host:5433/db"),
        ("postgresql://me:p%40ss%2Fword@host/db", "p@ss/word", "postgresql://me@host/db"),
        ("postgresql://me:se/cr#et@host/db", "se/cr#et", "postgresql://me@host/db"),
        ("postgresql://me:100%@host/db", "100%", "postgresql://me@host/db"),
        ("postgresql://me:x:y@host/db?application_name=a@b", "x:y", "postgresql://me@host/db"),
        ("postgresql+psycopg2://me:p@/db?host=h1:1,h2:2", "p", "postgresql://me@h1:1,h2:2/db"),
        ("postgresql://me:p@[::1]:5432/db", "p", "postgresql://me@[::1]:5432/db"),
        ("postgresql://me:12?b=a@host/db", "12?b=a", "postgresql://me@host/db"),
        ("postgresql:///db", None, "postgresql:///db"),
        ("postgresql://me@/db?host=/tmp/sock", None, "postgresql://me@/tmp/sock/db"),
        ("postgresql://?host=h&port=5&dbname=db&user=me&password=secret", None, "postgresql://me@h:5/db"),
    ],
)
def test_pasted_urls_are_understood(url: str, password: str | None, shown: str) -> None:
    """Passwords may have any character but an @; what is shown has neither them nor options."""
    address = address_of(url)
    given = urlsplit(address.dsn).password
    assert (given if given is None else unquote(given)) == password
    assert address.shown == shown
    assert "secret" not in repr(address)


def test_options_reach_the_driver_or_are_left_out() -> None:
    """The driver gets the options that it knows; those of other clients change nothing."""
    address = address_of("postgres://u@h/d?sslmode=require&channel_binding=require&connect_timeout=5&ssl=require")
    assert address.dsn == "postgresql://u@h/d?sslmode=require"
    assert not address.pooled
    assert address_of("postgres://u@h/d?pgbouncer=true").pooled


def test_all_users_of_a_server_mean_the_same_one() -> None:
    """Where answers are kept does not depend on who works there."""
    assert address_of("postgres://a:b@h/d").server == address_of("postgresql://c@h/d?sslmode=require").server


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:hunter2@host:abc/db", "host, port or database cannot be read"),
        ("postgresql://me:hunter2@host:99999/db", "host, port or database cannot be read"),
        ("postgresql://me:hunter2@a..b/db", "host, port or database cannot be read"),
        ("postgresql://me:12@hunter2@host/db", "percent-encode what is special"),
        ("postgresql://me:12@hunter2?x@host/db?sslmode=require", "got: others"),
        ("postgresql://me:hunter2@one:1,two:2/db", r"write several hosts as \?host=one,two"),
        ("postgresql://me:hunter2@host/a/b", "host, port or database cannot be read"),
        ("postgresql://me:hunter2@host/db?foo=1&bar=2", "got: bar, foo"),
        ("mysql://me:hunter2@host/db", "another kind"),
        ("postgresql://me:hunter2@host/d\0b", "got: one with a NUL character"),
        ("postgresql://m%00e:hunter2@host/db", "got: one with a NUL character"),
        ("postgresql://me:hunter2\ud800@host/db", "or half a surrogate pair; remove it"),
    ],
)
def test_what_cannot_be_read_is_refused_without_its_password(url: str, words: str) -> None:
    """A wrong URL is refused with what is wrong; the password is not repeated."""
    with pytest.raises(UsageError, match=words) as caught:
        address_of(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["sslrootcert", "sslcert", "sslkey", "sslcrl"])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A certificate that is not there is a wrong URL, not a server to wait for."""
    url = f"postgresql://me:hunter2@host/db?sslmode=verify-full&{name}="
    with pytest.raises(UsageError, match=f"{name}=/no/such.crt .*: No such file or directory; correct") as caught:
        address_of(f"{url}/no/such.crt")
    assert "hunter2" not in str(caught.value)
    (tmp_path / "empty.crt").touch()
    if name == "sslrootcert":
        with pytest.raises(UsageError, match=r"empty.crt .*: it holds no certificate; correct"):
            address_of(f"{url}{tmp_path}/empty.crt")
    assert not address_of(f"postgresql://me@host/db?sslmode=disable&{name}=/no/such.crt").pooled
    monkeypatch.setenv(f"PG{name.upper()}", "/no/such.crt")
    with pytest.raises(UsageError, match=f"{name}=/no/such.crt of the environment's PG{name.upper()}: "):
        address_of("postgresql://me@host/db")


def test_a_certificate_that_is_not_there_ends_a_command_at_once(tmp_path: Path) -> None:
    """Nothing is tried again: one line and the exit code of a wrong flag."""
    url = "postgresql://me:hunter2@127.0.0.1:1/db?sslmode=verify-full&sslrootcert=/no/such.crt"
    for command in (("status",), ("worker", "--patience", "60"), ("worker", "--exclusive"), ("doctor",)):
        done = Cli(tmp_path, db_url=url)(*command, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith("lbr: cannot use sslrootcert=/no/such.crt of the PostgreSQL URL")
