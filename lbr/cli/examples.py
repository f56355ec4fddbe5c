"""The sections of `lbr --help`, and the examples at the end of each command's help."""

SECTIONS = {
    "Run": ("run", "enqueue", "worker", "collect", "estimate"),
    "Look": ("status", "dashboard", "list", "failures", "show", "compare", "doctor"),
    "Operate": (
        "retry",
        "pause",
        "resume",
        "cancel",
        "limit",
        "batches",
        "rm",
        "prune",
        "move",
        "backup",
        "completion",
    ),
}
EXAMPLES = {
    "run": (
        "run reviews.csv -o answers.csv --model openai-chat:gpt-4o-mini",
        "run prompts.txt -o answers.jsonl --function mymodule:answer --max-cost 5",
    ),
    "enqueue": (
        "enqueue prompts.txt --model openai-chat:gpt-4o-mini",
        "enqueue reviews.csv --template 'Translate: {{ text }}' --dry-run",
    ),
    "worker": ("worker", "worker --run reviews --concurrency 100 --max-cost 5"),
    "collect": ("collect reviews -o answers.csv", "collect reviews --failed"),
    "estimate": ("estimate reviews.csv --model openai-chat:gpt-4o-mini --output-tokens 300",),
    "status": ("status", "status reviews --watch"),
    "dashboard": ("dashboard", "dashboard --read-only --port 8765 --token-file ~/.lbr-token"),
    "list": ("list", "list --db postgresql://host/name"),
    "failures": ("failures reviews", "failures reviews --rows"),
    "show": ("show reviews 17", "show reviews --id customer-42"),
    "compare": ("compare reviews reviews-2 --rows 50",),
    "doctor": ("doctor", "doctor --fix"),
    "retry": (
        "retry reviews --where family=bad_answer",
        "retry reviews --where finish_reason=length --set max_tokens=2000",
    ),
    "pause": ("pause reviews --reason 'the template is wrong'",),
    "resume": ("resume reviews --max-cost 20",),
    "cancel": ("cancel reviews",),
    "limit": ("limit", "limit openai-chat:gpt-4o-mini --rpm 500 --tpm 200000"),
    "batches": ("batches", "batches --forget 1f0c2b9a7d3e"),
    "rm": ("rm reviews",),
    "prune": ("prune --older 30d --dry-run",),
    "move": ("move runs.db postgresql://host/name reviews",),
    "backup": ("backup copy.db",),
    "completion": (
        "completion bash > ~/.local/share/bash-completion/completions/lbr",
        'completion zsh > "${fpath[1]}/_lbr"',
        "completion fish > ~/.config/fish/completions/lbr.fish",
    ),
}


def epilog_of(name: str) -> str:
    """Return the end of a command's help: its examples, each on its own line."""
    return "\n".join(["\b", "Examples:", *(f"  lbr {line}" for line in EXAMPLES[name])])
