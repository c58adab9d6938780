"""A generation loop over a model that is a hash: what it computes, and what must hold after each step."""

import collections
import types
import zlib

import torch

from hmi_engine.errors import UnknownTenantError
from hmi_engine.generation.adapter_budget import AdapterBudget
from hmi_engine.generation.block_pool import BlockPool, PrefixKeys
from hmi_engine.generation.loop import GenerationLoop
from hmi_engine.generation.sequence import DecoderSequence
from hmi_engine.generation.text_stream import TextStream
from hmi_engine.generation.token_choice import NextToken, TokenChooser
from hmi_engine.pipeline.read_out import HeadOutput
from hmi_engine.request import Request
from hmi_engine.sampling import Sampling

NUM_TOKENS = 347
END = 0
LIKELY = (END, 65, 66, 120, 200, 300)  # some are half a character


def next_token_of(tenant, token_ids):
    """What the model of a tenant says after these tokens: a number for each that follows from all of them."""
    logits = torch.full((NUM_TOKENS,), -20.0)
    for place, token in enumerate(LIKELY):
        logits[token] = zlib.crc32(repr((tenant, tuple(token_ids), place)).encode()) % 1000 / 200
    logits[END] -= 2
    return NextToken(logits, int(logits.argmax()))


def head_output_of(tenant, token_ids):
    number = zlib.crc32(repr((tenant, tuple(token_ids))).encode()) % 10**6
    return HeadOutput("regression", ("score",), torch.tensor([float(number)]), False)


class CacheRunner:
    """Writes tokens into blocks as a model would write keys; what it says follows from what it reads."""

    def __init__(self, num_blocks, block_size, max_step_tokens, max_running, most_tenants):
        self.blocks = [[None] * block_size for _ in range(num_blocks)]
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.max_running = max_running
        self.most_tenants = most_tenants
        self.failing_steps = set()
        self.num_steps = 0
        self.problems = []
        self.first_steps = {}
        self.num_computed = collections.Counter()  # tokens of each sequence, those computed again twice
        self.is_resting = True

    def rest(self):
        self.is_resting = True

    def run(self, scheduled):
        self.is_resting = False
        try:
            return self.computed(scheduled)
        except AssertionError as error:
            self.problems.append(error)  # the loop takes it for a failure of a step
            raise

    def computed(self, scheduled):
        self.check(scheduled)
        self.num_steps += 1
        for each in scheduled:
            self.first_steps.setdefault(each.sequence, self.num_steps)
            self.num_computed[each.sequence] += each.num_tokens
        if self.num_steps in self.failing_steps:
            raise ZeroDivisionError("as if a kernel had failed")
        for each in scheduled:
            self.write(each)
        return [self.output(each) for each in scheduled]

    def check(self, scheduled):
        sequences = [each.sequence for each in scheduled]
        assert sequences and len(sequences) == len(set(sequences)) <= self.max_running
        assert all(each.num_tokens >= 1 for each in scheduled)
        assert sum(each.num_tokens for each in scheduled) <= self.max_step_tokens
        tenants = [sequence.tenant.name for sequence in sequences]
        assert tenants == sorted(tenants), "a tenant's sequences stand together"
        assert len(set(tenants)) <= self.most_tenants, "there is room for their adapters"
        written = {
            each.sequence.blocks[(each.sequence.num_computed + ahead) // self.block_size]
            for each in scheduled
            for ahead in range(each.num_tokens)
        }
        held = collections.Counter(block for sequence in sequences for block in sequence.blocks)
        assert all(held[block] == 1 for block in written), "what is written is nobody else's"

    def write(self, each):
        sequence, start = each.sequence, each.sequence.num_computed
        for place in range(start, start + each.num_tokens):
            block = self.blocks[sequence.blocks[place // self.block_size]]
            block[place % self.block_size] = (sequence.tenant.weights, place, sequence.token_ids[place])

    def output(self, each):
        sequence = each.sequence
        if sequence.request.id["fails_at"] < sequence.num_computed + each.num_tokens:
            return UnknownTenantError(f"tenant {sequence.tenant.name!r} is gone")
        if not each.is_complete:
            return None
        read = []
        for place in range(sequence.num_computed + each.num_tokens):
            block = self.blocks[sequence.blocks[place // self.block_size]]
            weights, written_at, token = block[place % self.block_size]
            assert (weights, written_at) == (sequence.tenant.weights, place)
            read.append(token)
        of_kind = next_token_of if sequence.is_generating else head_output_of
        return of_kind(sequence.tenant.weights, read)


class World:
    """A loop, and what became of each sequence."""

    def __init__(
        self, tokenizer, *, num_blocks=6, block_size=2, max_step_tokens=8, max_running=8, most_tenants=100
    ):
        self.tokenizer = tokenizer
        self.pool = BlockPool(num_blocks)
        self.runner = CacheRunner(num_blocks, block_size, max_step_tokens, max_running, most_tenants)
        self.loop = GenerationLoop(
            self.runner,
            self.pool,
            AdapterBudget(lambda tenant: 10, lambda: 10 * most_tenants),
            self.finish,
            block_size=block_size,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
        )
        self.coming = collections.deque()  # sequences that the loop may ask for
        self.alive = []
        self.begun = []
        self.results = {}
        self.emitted = collections.defaultdict(list)
        self.on_finish = lambda sequence: None

    def sequence(self, tenant, prompt, sampling=None, *, most_tokens=10**6, fails_at=10**6):
        """``tenant``: its name; the first letter stands for its weights, which others may have too."""
        sampling = sampling or Sampling()
        sequence = DecoderSequence(
            request=Request(tenant, input_ids=prompt, sampling=sampling, id={"fails_at": fails_at}),
            tenant=types.SimpleNamespace(
                name=tenant, weights=tenant[0], id=tenant, generation=1, sha256=tenant[0]
            ),
            token_ids=list(prompt),
            num_prompt=len(prompt),
            is_generating=not tenant.endswith("head"),
            end_tokens=(END,),
            most_tokens=most_tokens,
            keys=PrefixKeys(tenant[0].encode(), b"", self.runner.block_size),
            respond=lambda _: None,
            tickets=([], []),
            arrived=0.0,
            chooser=TokenChooser(sampling),
            text=TextStream(self.tokenizer, sampling.stop),
        )
        sequence.emit = self.emitted[sequence].append
        return sequence

    def add(self, sequence):
        self.loop.check_fits(sequence)
        self.alive.append(sequence)
        self.begun.append(sequence)
        self.loop.add(sequence)

    def next_sequence(self):
        if not self.coming:
            return None
        sequence = self.coming.popleft()
        self.alive.append(sequence)
        self.begun.append(sequence)
        return sequence

    def finish(self, sequence, result):
        assert sequence in self.alive and sequence not in self.results, "every sequence ends once"
        assert sequence.blocks == []
        self.alive.remove(sequence)
        self.results[sequence] = result
        self.on_finish(sequence)

    def step(self):
        """One step, after which the counts must be right, and every text under way has its next token."""
        under_way = {
            sequence: len(sequence.token_ids)
            for sequence in self.alive
            if sequence.blocks and sequence.num_waiting == 1 and sequence.is_generating
        }
        preempted = self.loop.statistics.preemptions
        is_busy = self.loop.step(self.next_sequence)
        assert self.runner.problems == []
        assert self.runner.is_resting or self.loop.statistics.running, "nobody runs, so nothing is held"
        assert is_busy or not self.alive, "while something is left, something is computed"
        stayed = [
            sequence
            for sequence, length in under_way.items()
            if sequence in self.alive and len(sequence.token_ids) == length
        ]
        statistics = self.loop.statistics
        assert len(stayed) <= statistics.preemptions - preempted
        assert len(self.loop) == len(self.alive) == statistics.running + statistics.waiting
        are_running = [bool(sequence.blocks) for sequence in self.alive]
        assert are_running == sorted(are_running, reverse=True), "who came first is never behind"
        held = {block for sequence in self.alive for block in sequence.blocks}
        assert self.pool.num_held == statistics.blocks_held == len(held)
        return is_busy

    def run(self):
        while self.step():
            pass
        assert self.pool.num_held == 0 and len(self.loop) == 0 and not self.alive
