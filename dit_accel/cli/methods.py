"""`dit-accel methods` and `dit-accel selectors`."""


def methods() -> None:
    """List the methods, their presets and papers."""
    from rich.table import Table
    from rich.text import Text

    from dit_accel.cli.screen import screen
    from dit_accel.methods import find, infos

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("method", "what it does", "presets", "paper", "fine-tuning"):
        table.add_column(column)
    for name, info in infos().items():
        presets = ", ".join(f"{name}:{p}" for p in find(name).presets)
        tuned = "needed" if info.finetuning else "no"
        table.add_row(Text(name, "bold"), info.description, presets, info.paper, tuned)
    screen().print(table, soft_wrap=False)


def selectors() -> None:
    """List the selectors: how a method may choose the blocks it reads."""
    from rich.table import Table
    from rich.text import Text

    from dit_accel.cli.screen import screen
    from dit_accel.methods.selectors import infos

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("selector", "what it reads", "paper"):
        table.add_column(column)
    for name, info in infos().items():
        table.add_row(Text(name, "bold"), info.description, info.paper)
    screen().print(table, soft_wrap=False)
