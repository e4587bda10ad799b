"""What is asked of arguments all over the package."""


def check_positive(name: str, value: int) -> None:
    """Raise a `ValueError` that names the argument unless its value is 1 or more."""
    if value < 1:
        raise ValueError(f"`{name}` is {value}: choose 1 or more.")
