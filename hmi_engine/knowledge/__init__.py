"""What is kept, and its files: general, domain and task knowledge, the catalog, corpora and verification.

Nothing here runs a model. Modules are imported by their own names (``from hmi_engine.knowledge.catalog
import Catalog``); ``docs/architecture.md`` describes the files of a store.
"""

__all__: list[str] = []
