"""What the grouped kernels read of a slot is its present tenant's, and nothing else."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hmi_engine.knowledge.adapter_kinds import KIND_OF_SITE
from hmi_engine.knowledge.adapters import QUERY_KEY_VALUE, Site
from hmi_engine.knowledge.tenant_file import BlockLayout
from hmi_engine.memory.slot_tables import SlotTables
from hmi_kernels import ACTIVATIONS

NOTHING = (-1, 0, 0, 0.0)
LAYERS = range(3)


def block(layer, site, rank, offset, **settings):
    if KIND_OF_SITE[site].has_rank:
        settings.setdefault("scale", 0.5)
    return BlockLayout(layer, site, rank, settings, 8, 8, offset, 16 * max(rank, 1))


def entry(tables, layer, site, slot):
    try:
        table = tables.at(layer, site)
    except KeyError:
        return NOTHING
    assert (table.ranks <= table.max_rank).all()
    return (
        table.offsets[slot].item(),
        table.ranks[slot].item(),
        table.activations[slot].item(),
        table.scales[slot].item(),
    )


def test_blocks_are_told_by_layer_and_site():
    tables = SlotTables(num_slots=1)
    blocks = (block(1, Site.QUERY, 4, 10), block(2, Site.AFTER_FFN, 2, 99, activation="silu", scale=2.0))
    slot = tables.assign(blocks, 1000)
    assert entry(tables, 1, Site.QUERY, slot) == (1010, 4, 0, 0.5)
    assert entry(tables, 2, Site.AFTER_FFN, slot) == (1099, 2, ACTIVATIONS.index("silu"), 2.0)
    assert entry(tables, 0, Site.QUERY, slot) == NOTHING


@st.composite
def tenants(draw):
    places = draw(st.sets(st.tuples(st.sampled_from(LAYERS), st.sampled_from(list(Site))), max_size=12))
    blocks = []
    for number, (layer, site) in enumerate(sorted(places)):
        rank = draw(st.integers(1, 64)) if KIND_OF_SITE[site].has_rank else 0
        blocks.append(block(layer, site, rank, 16 * number, scale=draw(st.sampled_from([0.5, 2.0]))))
    return tuple(blocks)


class SlotTablesMachine(RuleBasedStateMachine):
    """Slots against a dictionary: whatever was loaded and evicted before, only the present tenants show."""

    def __init__(self):
        super().__init__()
        self.tables = SlotTables(num_slots=1)
        self.held = {}

    @rule(blocks=tenants(), arena_offset=st.integers(0, 1000))
    def assign(self, blocks, arena_offset):
        slot = self.tables.assign(blocks, arena_offset)
        assert slot not in self.held, "a slot in use is never given out"
        self.held[slot] = {
            (block.layer, block.site): (
                arena_offset + block.offset_elements,
                block.rank,
                0,
                block.settings["scale"],
            )
            for block in blocks
        }

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def clear(self, data):
        slot = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[slot]
        self.tables.clear(slot)

    @invariant()
    def every_entry_is_that_of_the_slot_s_tenant(self):
        for slot in range(self.tables.num_slots):
            expected = self.held.get(slot, {})
            for layer in LAYERS:
                for site in Site:
                    found = entry(self.tables, layer, site, slot)
                    assert found == expected.get((layer, site), NOTHING)

    @invariant()
    def projections_of_a_layer_are_one_block_of_memory(self):
        for layer in LAYERS:
            try:
                together = self.tables.at_projections(layer)
            except KeyError:
                for site in QUERY_KEY_VALUE:
                    assert all(entry(self.tables, layer, site, slot) == NOTHING for slot in self.held)
                continue
            assert all(part.is_contiguous() for part in together[:4])
            for place, site in enumerate(QUERY_KEY_VALUE):
                single = self.tables.at(layer, site)
                for rows, row in zip(together[:4], single[:4], strict=True):
                    assert rows[place].tolist() == row.tolist()
                assert together.max_rank >= single.max_rank


SlotTablesMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestSlotTables = SlotTablesMachine.TestCase
