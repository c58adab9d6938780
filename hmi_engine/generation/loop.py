"""Continuous batching: requests join and leave at every step; prompts are taken in beside the texts."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hmi_engine.errors import HmiError, OverloadedError
from hmi_engine.generation.adapter_budget import AdapterBudget
from hmi_engine.generation.block_pool import BlockPool
from hmi_engine.generation.sequence import DecoderSequence, FinishReason
from hmi_engine.generation.step import StepRunner
from hmi_engine.generation.step_compute import Scheduled, StepOutput
from hmi_engine.pipeline.faults import as_fault
from hmi_engine.pipeline.read_out import HeadOutput

__all__ = ["GenerationLoop", "GenerationStatistics", "NextSequence"]

_logger = logging.getLogger("hmi_engine")

_MOST_GIVEN_UP = 4
"""At most one in so many tokens of a step is left for the next, so that a piece ends with a block."""

NextSequence = Callable[[], DecoderSequence | None]
"""Gives a sequence that fits, and whose turn it is to begin; None if there is none."""

Finish = Callable[[DecoderSequence, FinishReason | HeadOutput | HmiError], None]
"""Called once for each sequence that ends or was cancelled, when it holds no blocks any more."""


@dataclass
class GenerationStatistics:
    """Counts since the engine started.

    Attributes:
        steps: that were computed.
        prompt_tokens: of prompts, computed.
        reused_tokens: of prompts, found in the cache.
        generated_tokens: of texts.
        preemptions: sequences that gave their blocks up and were computed again.
        running: sequences that hold blocks now.
        waiting: sequences that do not.
        blocks: of the cache.
        blocks_held: that sequences hold.
    """

    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_held: int = 0


class GenerationLoop:
    """Decides what each step computes, and sees to the blocks. For one thread.

    Texts that are under way go first, a token each; what is left of the token budget takes prompts, in the
    order in which they came, a prompt in pieces if it is longer (Agrawal et al., "Sarathi-Serve", OSDI 2024).
    Where the cache is full, the sequence that came last gives its blocks up and is computed again later. Who
    comes first waits while there is no room for the tenant's adapter beside those of the texts under way.
    """

    def __init__(
        self,
        runner: StepRunner,
        pool: BlockPool,
        adapters: AdapterBudget,
        finish: Finish,
        *,
        block_size: int,
        max_step_tokens: int,
        max_running: int,
    ) -> None:
        """Nothing waits yet.

        Args:
            runner: computes steps.
            pool: of the cache's blocks.
            adapters: room for those of the texts under way.
            finish: is told of the ends.
            block_size: tokens of a block.
            max_step_tokens: most tokens of a step.
            max_running: most sequences that hold blocks; no more than a step has tokens.
        """
        self._runner = runner
        self._block_size = block_size
        self._pool = pool
        self._adapters = adapters
        self._finish = finish
        self._max_step_tokens = max_step_tokens
        self._max_running = min(max_running, max_step_tokens)  # each text gets a token in each step
        self._waiting: deque[DecoderSequence] = deque()
        self._running: list[DecoderSequence] = []  # in the order in which they came
        self._statistics = GenerationStatistics(blocks=pool.num_blocks)

    def __len__(self) -> int:
        """Sequences that are not at their end."""
        return len(self._waiting) + len(self._running)

    @property
    def statistics(self) -> GenerationStatistics:
        """How things stand."""
        self._statistics.running = len(self._running)
        self._statistics.waiting = len(self._waiting)
        self._statistics.blocks_held = self._pool.num_held
        return self._statistics

    def check_fits(self, sequence: DecoderSequence) -> None:
        """Raises OverloadedError for a sequence that the cache could not hold even alone."""
        most = sequence.num_prompt + (sequence.sampling.max_tokens if sequence.is_generating else 0)
        needed = -(-min(most, sequence.most_tokens) // self._block_size)
        if needed > self._pool.num_blocks:
            raise OverloadedError(
                f"the request needs {needed} blocks of {self._block_size} tokens, but the cache has "
                f"{self._pool.num_blocks}: ask for fewer tokens, or give the engine more cache_memory"
            )

    def add(self, sequence: DecoderSequence) -> None:
        """Queues a sequence that fits."""
        self._waiting.append(sequence)

    def abandon(self) -> list[DecoderSequence]:
        """Takes everything out that has not ended; it holds nothing any more."""
        left = [*self._running, *self._waiting]
        for sequence in list(self._running):
            self._leave(sequence)
        self._waiting.clear()
        self._runner.rest()
        return left

    def step(self, next_sequence: NextSequence = lambda: None) -> bool:
        """Computes one step; returns whether there was anything to compute.

        While nobody waits here and the step has room for one more, ``next_sequence`` is asked for it: so a
        step begins with all that it can, and of those asked for at most one waits that it could not begin.
        """
        self._drop_cancelled()
        scheduled = self._schedule(next_sequence)
        if not scheduled:
            self._runner.rest()
            return False
        try:
            outputs = self._runner.run(scheduled)
        except Exception as error:
            _logger.error("a step of the decoder failed", exc_info=error)
            outputs = [as_fault(error, "compute")] * len(scheduled)
        self._statistics.steps += 1
        for each, output in zip(scheduled, outputs, strict=True):
            self._take(each, output)
        if not self._running:
            self._runner.rest()
        return True

    def _drop_cancelled(self) -> None:
        for sequence in [each for each in self._running if each.is_cancelled]:
            self._leave(sequence)
            self._finish(sequence, FinishReason.STOP)
        # Asked once: another thread, or who is told of an end, may cancel more meanwhile.
        cancelled = [each for each in self._waiting if each.is_cancelled]
        for sequence in cancelled:
            self._waiting.remove(sequence)
            self._finish(sequence, FinishReason.STOP)

    def _schedule(self, next_sequence: NextSequence) -> list[Scheduled]:
        budget = self._max_step_tokens
        planned: dict[DecoderSequence, int] = {}
        for sequence in sorted(self._running, key=lambda each: each.num_waiting > 1):
            count = self._piece(sequence, budget)
            # One that has given its blocks up meanwhile is not under way any more.
            if count and sequence.blocks and self._reserve(sequence, count, planned):
                planned[sequence] = count
                budget -= count
        while budget and len(self._running) < self._max_running and self._has_waiting(next_sequence):
            sequence = self._waiting[0]
            if not self._adapters.has_room_for(sequence.tenant):
                break
            count = self._begin(sequence, budget)
            if not count:
                break
            self._waiting.popleft()
            self._running.append(sequence)
            self._adapters.add(sequence.tenant)
            planned[sequence] = count
            budget -= count
        # Sequences of one tenant are one segment of the grouped kernels.
        ordered = sorted(planned, key=lambda each: each.tenant.name)
        return [Scheduled(sequence, planned[sequence]) for sequence in ordered]

    def _has_waiting(self, next_sequence: NextSequence) -> bool:
        """Whether one waits to begin, after asking for it if need be."""
        if not self._waiting and (sequence := next_sequence()) is not None:
            self._waiting.append(sequence)
        return bool(self._waiting)

    def _begin(self, sequence: DecoderSequence, budget: int) -> int:
        """Finds what of a sequence is in the cache, reserves blocks; returns how many tokens to compute."""
        # At least the last token is computed: its hidden state is what comes next.
        whole = (len(sequence.token_ids) - 1) // self._block_size
        sequence.blocks = self._pool.find(sequence.keys.extend(sequence.token_ids)[:whole])
        sequence.num_kept = len(sequence.blocks)
        sequence.num_computed = sequence.num_kept * self._block_size
        count = self._piece(sequence, budget)
        taken = self._pool.take(self._missing_blocks(sequence, count))
        if taken is None:
            self._give_up(sequence)
            return 0
        sequence.blocks += taken
        if sequence.started is None:  # one that gave its blocks up finds its own again
            sequence.started = time.perf_counter()
            sequence.num_reused = sequence.num_computed
            self._statistics.reused_tokens += sequence.num_reused
        return count

    def _piece(self, sequence: DecoderSequence, budget: int) -> int:
        """How many tokens to compute: all, or about ``budget``, up to the end of a block if it is near.

        What begins with a block can be shared, see ``hmi_engine.generation.shared_prefixes``.
        """
        if sequence.num_waiting <= budget:
            return sequence.num_waiting
        rest = (sequence.num_computed + budget) % self._block_size
        return budget - rest if rest <= budget // _MOST_GIVEN_UP else budget

    def _missing_blocks(self, sequence: DecoderSequence, count: int) -> int:
        return -(-(sequence.num_computed + count) // self._block_size) - len(sequence.blocks)

    def _reserve(self, sequence: DecoderSequence, count: int, planned: dict[DecoderSequence, int]) -> bool:
        """Takes the blocks for a sequence's next tokens, from those that came last if there are no others."""
        needed = self._missing_blocks(sequence, count)
        if needed <= 0:
            return True
        while needed > self._pool.num_unused:
            last = self._running[-1]
            self._preempt(last)
            planned.pop(last, None)
            if last is sequence:
                return False
        sequence.blocks += self._pool.take(needed) or []
        return True

    def _preempt(self, sequence: DecoderSequence) -> None:
        self._leave(sequence)
        self._waiting.appendleft(sequence)
        self._statistics.preemptions += 1

    def _leave(self, sequence: DecoderSequence) -> None:
        """Takes a sequence out of those under way, with all that it holds."""
        self._running.remove(sequence)
        self._adapters.remove(sequence.tenant)
        self._give_up(sequence)

    def _give_up(self, sequence: DecoderSequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_kept = 0

    def _take(self, each: Scheduled, output: StepOutput) -> None:
        sequence = each.sequence
        if isinstance(output, HmiError):
            self._end(sequence, output)
            return
        in_prompt = max(0, min(each.num_tokens, sequence.num_prompt - sequence.num_computed))
        self._statistics.prompt_tokens += in_prompt
        sequence.num_computed += each.num_tokens
        self._keep_full_blocks(sequence)
        if isinstance(output, HeadOutput):
            self._end(sequence, output)
        elif output is not None:
            self._statistics.generated_tokens += 1
            try:
                finish: FinishReason | HmiError | None = sequence.choose(output)
            except Exception as error:
                finish = as_fault(error, "respond")
            if finish is not None:
                self._end(sequence, finish)

    def _keep_full_blocks(self, sequence: DecoderSequence) -> None:
        full = sequence.num_computed // self._block_size
        if full > sequence.num_kept:
            keys = sequence.keys.extend(sequence.token_ids)
            for place in range(sequence.num_kept, full):
                self._pool.keep(sequence.blocks[place], keys[place])
            sequence.num_kept = full

    def _end(self, sequence: DecoderSequence, result: FinishReason | HeadOutput | HmiError) -> None:
        self._leave(sequence)
        self._finish(sequence, result)
