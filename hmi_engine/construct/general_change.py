"""Puts a distilled base model in the place of a store's present one."""

from __future__ import annotations

import shutil

from hmi_engine.construct.counting import Progress
from hmi_engine.construct.distilled_model import DistilledModel, write_folder
from hmi_engine.construct.domain_tree import TreeChange
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.tensor_file import file_sha256
from hmi_engine.memory.domain_layers import DomainLayerLibrary
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.general_folder import WEIGHTS_FILE

__all__ = ["replace_general"]


def replace_general(
    catalog: Catalog, distilled: DistilledModel, *, progress: Progress | None = None
) -> GeneralInfo:
    """Replaces the base model of a store, and computes the rows of every domain that inherits its layers.

    The model goes into a new folder, the tables into new generations, and one transaction of the catalog puts
    them all in place: a crash leaves the old state or the new, and at most a folder that ``verify`` finds.
    Stores and engines that have the old model open refuse to go on with the new tables.

    Returns:
        The description of the new base model.

    Raises:
        GeneralInUseError: the store has tenants; nothing was changed.
        StoreBusyError: someone else changed the tree meanwhile; nothing was changed.
        StoreFullError: no room; nothing was changed.
    """
    general, layout = catalog.general, catalog.layout
    old = layout.general_folder(general.folder)
    # One lock from the first file to the commit: a repair of this process would take the files for orphans.
    with catalog.change_lock:
        catalog.check_no_tenants()
        (number,) = catalog.reserve()
        name = layout.general_generation(number)
        folder = layout.general_folder(name)
        try:
            write_folder(folder, old, distilled)
            identity = f"{file_sha256(folder / WEIGHTS_FILE)[:16]}:{general.plot_layers}"
            new = general.model_copy(update={"folder": name, "domain_layers": identity})
            library = DomainLayerLibrary(catalog, HierarchicalBert.load(folder, general.plot_layers), new)
            with TreeChange(catalog, library, progress=progress) as change:
                change.replace_base(identity)
                change.commit(general=new)
        except BaseException:
            if catalog.general.folder != name:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)
    return new
