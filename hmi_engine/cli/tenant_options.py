"""Arguments and options that several of tenants' commands take."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["DomainOption", "ReplaceOption", "TenantName"]

TenantName = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the tenant, such as acme/chemprot.", show_default=False)
]
DomainOption = Annotated[str, typer.Option(help="The tenant's domain.")]
ReplaceOption = Annotated[bool, typer.Option(help="Replace a tenant of this name.")]
