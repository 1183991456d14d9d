"""`exaonepath doctor`."""

from __future__ import annotations

from exaonepath.cli import options


def doctor(verbose: options.Verbose = 0, quiet: options.Quiet = False) -> None:
    """Versions, devices, and the available backends with reasons."""
    from rich.console import Console
    from rich.markup import escape

    from exaonepath.doctor import examine

    findings = examine()
    console = Console(soft_wrap=True, highlight=False)
    topic = ""
    for finding in findings if not quiet else []:
        if finding.topic != topic:
            topic = finding.topic
            console.print(f"[bold]{topic}[/bold]")
        mark = {True: "[green]ok[/green]", False: "[red]!![/red]", None: "  "}[finding.ok]
        console.print(f"  {mark} {finding.name:<24}{escape(finding.value)}")
