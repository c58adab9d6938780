"""How much of new text does a table hold, as its corpus and its budget grow?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arguments import RESULTS, Arguments
from benchmarks.growth_counts import MIN_COUNT, Growth, Ranking, Wanted, chain_shares, grow, table_shares
from benchmarks.growth_sets import LabelledSet, read_labelled_sets
from benchmarks.growth_texts import Group, Mixture, TokenizedTexts, documentation_groups, folder_groups
from benchmarks.recorded_command import recorded_command
from benchmarks.result import BenchmarkResult, Curve, Quantity
from hmi_engine.demo.base_model import PACKAGE, packaged_model
from hmi_engine.errors import HmiError
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["main", "measure"]

NAME = "coverage_growth"
QUESTION = "How much of new text does a table hold, as its corpus and its budget grow?"
ORDERS = {1: "unigrams", 2: "bigrams", 3: "trigrams"}
HIDDEN_SIZE = 384
MAX_TOKENS = 512
MAX_WORDS = 256
QUICK_TEXTS = 2000
CLOSE_TO_ALL = 0.9
MEBIBYTE = 1 << 20
TOKENS_LABEL, BUDGET_LABEL = "corpus tokens", "table budget in MiB"
FOUND_LABEL, ROW_LABEL = "share of held-out n-grams found", "share of held-out n-grams with a row"
NOTES = (
    f"An n-gram is found if the corpus holds it at least {MIN_COUNT} times, as a table asks by default. "
    "Held-out texts are of source files that are not in the corpus. Tokens include the two special tokens of "
    "each text.",
    "General text is all groups together: a corpus of any size holds each group in proportion to its size. "
    "For a domain, general text leaves the domain's own group out, in corpus and table.",
    f"A row of n slots takes n x {HIDDEN_SIZE} float16 values, key, count and its share of the index; rows "
    "are chosen by count. In a chain, general table and domain table get half the bytes each, and the "
    "domain's holds no row of the general one.",
    "Public sets: the n-grams of their test split, found in their training split and general text together.",
    "Where a miss costs as many tokens as its window is wide, exact mode is faster than no table from half "
    "of the bigrams found, or two thirds of the trigrams.",
)


@dataclass(frozen=True)
class Study:
    """What the study runs on.

    Attributes:
        groups: all text; ``domains`` names those that are looked at as domains.
        sets: public sets, perhaps none.
        first_size: the smallest corpus, in tokens; sizes double from there.
        budgets: of tables, in bytes, ascending.
    """

    groups: tuple[Group, ...]
    domains: tuple[str, ...]
    sets: tuple[LabelledSet, ...]
    first_size: int
    budgets: tuple[int, ...]

    def general(self, *, without: str | None = None) -> Mixture:
        """The corpora of all groups, or of all but one."""
        return Mixture(tuple(group.corpus for group in self.groups if group.name != without))

    def domain_groups(self) -> list[Group]:
        """The groups that are looked at as domains."""
        return [group for group in self.groups if group.name in self.domains]

    def sizes(self, total: int) -> list[int]:
        """Doubling sizes below ``total``; where there is none, ``total`` itself."""
        found: list[int] = []
        while (size := self.first_size << len(found)) < total:
            found.append(size)
        return found or [total]

    def domain_sizes(self) -> list[int]:
        """Doubling sizes that every domain's corpus has."""
        return self.sizes(min(group.corpus.num_tokens for group in self.domain_groups()))


def general_part(study: Study) -> tuple[list[Curve], list[Quantity]]:
    """General text from general text, and public sets with general text added."""
    general = study.general()
    total = general.num_tokens
    sizes = [*(size for size in study.sizes(total) if size < CLOSE_TO_ALL * total), total]
    held_out = TokenizedTexts.join(group.held_out for group in study.groups)
    curves: list[Curve] = []
    quantities: list[Quantity] = []
    budget_curves = []
    for order, name in ORDERS.items():
        own = Wanted.of(held_out, order)
        sets = {item.name: Wanted.of(item.test, order, item.train) for item in study.sets if order > 1}
        growth = grow(general, order, sizes, {"": own, **sets})
        curves.append(_curve("general", name, sizes, growth.shares[""]))
        curves += [_curve(f"sets-{name}", each, sizes, growth.shares[each]) for each in sets]
        quantities += _set_quantities(name, sets, growth)
        if order > 1:
            shares = table_shares(
                Ranking.of(growth.whole), own, study.budgets, order=order, hidden_size=HIDDEN_SIZE
            )
            budget_curves.append(_budget_curve("general-budget", name, study.budgets, shares))
    return sorted(curves, key=lambda curve: curve.figure != "general") + budget_curves, quantities


def _set_quantities(order: str, sets: Mapping[str, Wanted], growth: Growth) -> Iterator[Quantity]:
    for name, wanted in sets.items():
        for min_count, times in ((1, "once"), (2, "twice")):
            share = wanted.share_of_corpus(None, min_count)
            yield Quantity(
                name=f"{name}: {order} at least {times} in its training split", value=share, unit="share"
            )
        yield Quantity(
            name=f"{name}: {order} at least twice with all general text added",
            value=growth.shares[name][-1],
            unit="share",
        )


def domain_part(study: Study) -> list[Curve]:
    """Each domain's text from its own corpus, from general text, and from tables of a budget."""
    curves: list[Curve] = []
    for order in (2, 3):
        for group in study.domain_groups():
            print(f"{group.name}: {ORDERS[order]}", flush=True)
            curves += _domain_curves(study, group, order)
    return sorted(curves, key=lambda curve: curve.figure)


def _domain_curves(study: Study, group: Group, order: int) -> list[Curve]:
    """Curves of one domain; trigrams of corpora only."""
    others = study.general(without=group.name)
    wanted = {group.name: Wanted.of(group.held_out, order)}
    own_sizes = study.domain_sizes()
    smallest = min(study.general(without=name).num_tokens for name in study.domains)
    general_sizes = study.sizes(smallest)
    own = grow(Mixture((group.corpus,)), order, own_sizes, wanted)
    general = grow(others, order, general_sizes, wanted)
    curves = [
        _curve(f"domain-{ORDERS[order]}-of-own-text", group.name, own_sizes, own.shares[group.name]),
        _curve(
            f"domain-{ORDERS[order]}-of-general-text", group.name, general_sizes, general.shares[group.name]
        ),
    ]
    if order > 2:
        return curves
    return curves + _domain_budgets(
        study, wanted[group.name], group.name, Ranking.of(general.whole), Ranking.of(own.whole)
    )


def _domain_budgets(study: Study, wanted: Wanted, name: str, general: Ranking, own: Ranking) -> list[Curve]:
    figure, order = f"{name}-budget", 2
    shares = {
        "domain table": table_shares(own, wanted, study.budgets, order=order, hidden_size=HIDDEN_SIZE),
        "general table": table_shares(general, wanted, study.budgets, order=order, hidden_size=HIDDEN_SIZE),
        "chain of both": chain_shares(
            general, own, wanted, study.budgets, order=order, hidden_size=HIDDEN_SIZE
        ),
    }
    return [_budget_curve(figure, each, study.budgets, values) for each, values in shares.items()]


def _curve(figure: str, name: str, sizes: Sequence[int], shares: Sequence[float]) -> Curve:
    x = tuple(map(float, sizes))
    return Curve(figure=figure, name=name, x_label=TOKENS_LABEL, y_label=FOUND_LABEL, x=x, y=tuple(shares))


def _budget_curve(figure: str, name: str, budgets: Sequence[int], shares: Sequence[float]) -> Curve:
    x = tuple(budget / MEBIBYTE for budget in budgets)
    return Curve(figure=figure, name=name, x_label=BUDGET_LABEL, y_label=ROW_LABEL, x=x, y=tuple(shares))


def measure(study: Study, arguments: Arguments) -> BenchmarkResult:
    """Counts all and puts the result together."""
    general, quantities = general_part(study)
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={
            "vocabulary": PACKAGE,
            "corpus_tokens": study.general().num_tokens,
            "tokens": {group.name: group.corpus.num_tokens for group in study.groups},
            "held_out_tokens": {group.name: group.held_out.num_tokens for group in study.groups},
            "bytes_of_rows": {name: order * HIDDEN_SIZE * 2 for order, name in ORDERS.items() if order > 1},
        },
        notes=NOTES,
        quantities=quantities,
        curves=(*general, *domain_part(study)),
    )


def read_study(argv: Sequence[str] | None) -> tuple[Study, Arguments]:
    """Reads the command line and the texts that it names.

    Raises HmiError if a named domain is no group, or if there are fewer than two groups.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    command = recorded_command(NAME, argv)
    encoder = TextEncoder(packaged_model(), MAX_TOKENS)
    arguments = Arguments(None, options.out, options.quick, command)
    if options.corpus:
        max_texts = QUICK_TEXTS if options.quick else None
        groups = folder_groups(options.corpus, encoder, cache=options.cache, max_texts=max_texts)
    else:
        groups = documentation_groups(arguments, encoder, max_words=MAX_WORDS)
    names = [group.name for group in groups]
    domains = options.domains or names
    if len(groups) < 2 or not set(domains) <= set(names):
        raise HmiError(f"the domains {domains} must be among the groups, at least two, which are {names}")
    sets = read_labelled_sets(options.data, encoder) if options.data else []
    budgets = [MEBIBYTE << power for power in ((0, 2) if options.quick else range(4, 13))]
    first_size = 1 << 10 if options.quick or not options.corpus else 100_000
    return Study(tuple(groups), tuple(domains), tuple(sets), first_size, tuple(budgets)), arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=QUESTION)
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="a folder for each group: text files, one text a line, and held_out.txt with text of other "
        "source files; default: installed documentation",
    )
    parser.add_argument(
        "--domains", nargs="+", metavar="NAME", help="groups to look at as domains; default: all"
    )
    parser.add_argument("--data", type=Path, help="folder of public sets: */train.txt and */test.txt")
    parser.add_argument("--cache", type=Path, help="folder that keeps token ids for the next run")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    study, arguments = read_study(argv)
    result = measure(study, arguments)
    result.write(arguments.out)
    for curve in result.curves:
        print(f"{curve.figure}, {curve.name}: {curve.y[0]:.1%} to {curve.y[-1]:.1%}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
