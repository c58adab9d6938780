// From a segment to the adapter of its tokens: what lies in device memory is checked here before it is followed.
#pragma once

#include "cuda/adapter_plan.h"
#include "cuda/fault.h"
#include "cuda/grouped_adapter.h"
#include "cuda/numeric.cuh"

namespace hmi::cuda {

// kNothing: no adapter (slot -1 or rank 0), its rows are changed by a layer norm only. kFaulty: its rows stay.
enum class SlotState { kReady, kNothing, kFaulty };

// One projection's block in the arena; everything null, 0 and kIdentity unless the slot is kReady.
template <class Element>
struct AdapterSlot {
  const Element* down = nullptr;       // [input_size, rank]
  const Element* down_bias = nullptr;  // [rank]; null for LoRA
  const Element* up = nullptr;         // [rank, output_size]
  const Element* up_bias = nullptr;    // [output_size]; null for LoRA
  int32_t rank = 0;
  int32_t activation = kIdentity;
  float scale = 0.0f;
};

// One thread of the block is heard.
__device__ __forceinline__ SlotState refuse_slot(const GroupedAdapterArguments& arguments, Fault kind,
                                                 int64_t position) {
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    report_fault(arguments.fault, fault_word(kind, position));
  }
  return SlotState::kFaulty;
}

// Tokens [begin, end) with the adapter of one slot, not yet checked.
struct Segment {
  int64_t number;
  int64_t begin;
  int64_t end;
  int64_t slot;
};

// False after a fault. The same answer for every thread of the block.
__device__ __forceinline__ bool load_segment(const GroupedAdapterArguments& arguments, int64_t number,
                                             Segment& segment) {
  segment = {number, arguments.segment_offsets[number], arguments.segment_offsets[number + 1],
             arguments.segment_slots[number]};
  if (segment.begin >= 0 && segment.begin <= segment.end && segment.end <= arguments.num_tokens) return true;
  refuse_slot(arguments, Fault::kSegmentOffsets, number);
  return false;
}

// Of segment.number and segment.slot. The same answer for every thread of the block; nothing of the arena is read.
template <class Element>
__device__ __forceinline__ SlotState load_slot(const GroupedAdapterArguments& arguments, const Segment& segment,
                                               int projection, AdapterSlot<Element>& slot) {
  slot = {};
  if (segment.slot == -1) return SlotState::kNothing;
  if (segment.slot < 0 || segment.slot >= arguments.num_slots) {
    return refuse_slot(arguments, Fault::kSegmentSlots, segment.number);
  }

  // All at once, then the checks: one trip to memory instead of four.
  const bool is_bottleneck = arguments.slot_activations != nullptr;
  const int64_t entry = projection * arguments.num_slots + segment.slot;
  const int32_t rank = arguments.slot_ranks[entry];
  const int64_t offset = arguments.slot_offsets[entry];
  const float scale = arguments.slot_scales[entry];
  const int32_t activation = is_bottleneck ? arguments.slot_activations[segment.slot] : kIdentity;

  if (rank == 0) return SlotState::kNothing;
  if (rank < 0 || rank > arguments.max_rank || rank % kSizeMultiple != 0) {
    return refuse_slot(arguments, Fault::kSlotRanks, segment.slot);
  }
  if (is_bottleneck && (activation < 0 || activation >= kNumActivations)) {
    return refuse_slot(arguments, Fault::kSlotActivations, segment.slot);
  }
  const int64_t output_size = arguments.output_sizes[projection];
  const int64_t down_size = rank * int64_t{arguments.input_size};
  const int64_t up_size = rank * output_size;
  const int64_t block_size = down_size + up_size + (is_bottleneck ? rank + output_size : 0);
  if (offset < 0 || offset > arguments.arena_size - block_size || offset % kSizeMultiple != 0) {
    return refuse_slot(arguments, Fault::kSlotOffsets, segment.slot);
  }

  slot.down = static_cast<const Element*>(arguments.arena) + offset;
  slot.down_bias = is_bottleneck ? slot.down + down_size : nullptr;
  slot.up = slot.down + down_size + (is_bottleneck ? rank : 0);
  slot.up_bias = is_bottleneck ? slot.up + up_size : nullptr;
  slot.rank = rank;
  slot.activation = activation;
  slot.scale = scale;
  return SlotState::kReady;
}

template <class Element>
__device__ __forceinline__ SlotState load_slot(const GroupedAdapterArguments& arguments, int64_t segment,
                                               int projection, AdapterSlot<Element>& slot) {
  return load_slot(arguments, Segment{segment, 0, 0, arguments.segment_slots[segment]}, projection, slot);
}

}  // namespace hmi::cuda
