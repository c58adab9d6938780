"""Where the files of a store lie. Names given by users never become paths: only numbers made here do."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hmi_engine.errors import StoreCorruptError

__all__ = ["StoreLayout"]


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
        """Folder of the base model: configuration, tokenizer and weights."""
        return self.root / "general"

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
