"""Files of a checkpoint's folder, of which none may be a link to somewhere else."""

from pathlib import Path

# What an export reads, or transformers reads for it.
READ = ("*.json", "*.jinja", "*.tiktoken", "*.txt", "*.parquet", "*.safetensors", "additional_chat_templates")


def check_links(folder: Path) -> None:
    """
    Check that what an export reads lies in the folder.

    The folder itself may be a link. Within it, links may lead to files of the folder, and in a snapshot of the Hub's cache
    (`snapshots/REVISION`) to the cache's own files (`blobs`), since that is how the Hub's client keeps them.

    Raises:
        ValueError: A link leads elsewhere or nowhere: what a stranger's checkpoint points to could be anybody's secret.
    """
    root = folder.resolve()
    for pattern in READ:
        for path in sorted(folder.glob(pattern)):
            _check(path, root)
            if path.is_dir():
                for inside in path.rglob("*"):
                    _check(inside, root)


def _check(path: Path, root: Path) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ValueError(f"{path} is a link that leads nowhere; remove it or fetch the folder again.") from error
    if target.is_relative_to(root):
        return
    # Both are resolved, so that a `blobs` which is itself a link is no way out.
    if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs" and target.is_file():
        return
    raise ValueError(
        f"{path} is a link that leaves its folder, so the export would copy {str(target)!r}; put the file itself there if it "
        "belongs to the checkpoint, or remove the link."
    )
