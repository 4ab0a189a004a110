"""Which processes run below another one: whom a test may kill."""

from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line of everything below `pid`."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except (OSError, ValueError):
                continue
    found: dict[int, str] = {}
    level = [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found |= {child: names.get(child, "") for child in level}
    return found
