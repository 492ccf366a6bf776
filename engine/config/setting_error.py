"""The error of a wrong setting."""

from pipeline.system.errors import InputError


class SettingError(InputError):
    """A wrong setting: `key value: remedy`, or `key value (recipe): remedy`.

    key: dotted. value: as shown; empty if the key itself is wrong. recipe: the file that sets it.
    """

    def __init__(self, key: str, value: str, remedy: str, recipe: str = "") -> None:
        super().__init__(key, value, remedy, recipe)
        self.key, self.value, self.remedy, self.recipe = key, value, remedy, recipe

    def __str__(self) -> str:
        recipe = self.recipe and f"({self.recipe})"
        return f"{' '.join(filter(None, (self.key, self.value, recipe)))}: {self.remedy}"

    def in_recipe(self, recipe: str) -> "SettingError":
        """Return this error with the recipe that sets the value."""
        return SettingError(self.key, self.value, self.remedy, recipe)
