"""Where the files of a store lie. Names given by users never become paths: only numbers made here do."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hmi_engine.errors import StoreCorruptError

__all__ = ["StoreLayout"]

_GENERAL = re.compile(r"general(\.[0-9]+)?")


@dataclass(frozen=True)
class StoreLayout:
    """Paths inside the store folder ``root``.

    The catalog keeps paths relative to ``root``, as made by :meth:`plot_file` and :meth:`tenant_file`;
    :meth:`resolve` turns one into a path on disk.
    """

    root: Path

    @property
    def catalog(self) -> Path:
        """The SQLite catalog."""
        return self.root / "catalog.sqlite"

    @property
    def lock(self) -> Path:
        """The file that writers lock."""
        return self.root / "store.lock"

    @property
    def general(self) -> Path:
        """Folder of a new store's base model: configuration, tokenizer and weights."""
        return self.root / "general"

    def general_generation(self, number: int) -> str:
        """Name of the folder of a base model that takes the place of the one before."""
        return f"general.{int(number)}"

    def general_folder(self, name: str) -> Path:
        """Return the folder of the base model that the catalog names.

        Raises :class:`StoreCorruptError` for a name that is not one of ours, as :meth:`resolve` does.
        """
        if not _GENERAL.fullmatch(name):
            raise StoreCorruptError(
                f"{self.catalog}: the base model's folder {name!r} is none of the store's"
            )
        return self.root / name

    def general_folders(self) -> list[Path]:
        """Return the folders of base models that there are: the current one, and what crashes left."""
        return [path for path in sorted(self.root.glob("general*")) if _GENERAL.fullmatch(path.name)]

    @property
    def domains(self) -> Path:
        """Folder of all PLOT files."""
        return self.root / "domains"

    @property
    def tenants(self) -> Path:
        """Folder of all tenant files."""
        return self.root / "tenants"

    @property
    def builds(self) -> Path:
        """Folder of the builds that are going on or were interrupted."""
        return self.root / "builds"

    def plot_file(self, domain_id: int, generation: int) -> str:
        """Relative path of one generation of a domain's PLOT."""
        return f"domains/{int(domain_id)}/{int(generation)}.plot.safetensors"

    def layers_file(self, domain_id: int, generation: int) -> str:
        """Relative path of a domain's own domain layers."""
        return f"domains/{int(domain_id)}/{int(generation)}.layers.safetensors"

    def traffic_file(self, domain_id: int, number: int) -> str:
        """Relative path of n-grams that engines saw in a domain's traffic."""
        return f"domains/{int(domain_id)}/{int(number)}.traffic.safetensors"

    def tenant_file(self, tenant_id: int, generation: int) -> str:
        """Relative path of one generation of a tenant; 256 folders keep each folder small."""
        return f"tenants/{int(tenant_id) % 256:02x}/{int(tenant_id)}.{int(generation)}.safetensors"

    def resolve(self, file: str) -> Path:
        """Return the path on disk of a relative path from the catalog.

        Raises :class:`StoreCorruptError` if it would leave the store: a damaged or forged catalog must not
        make us read or remove files elsewhere.
        """
        relative = PurePosixPath(file)
        if (
            relative.is_absolute()
            or ".." in relative.parts
            or relative.parts[:1] not in (("domains",), ("tenants",))
        ):
            raise StoreCorruptError(f"{self.catalog}: file {file!r} lies outside the store's folders")
        return self.root / relative
