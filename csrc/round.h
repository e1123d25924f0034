// Round: one collective at one peer, as data: chunks, who sent what, where the bytes lie.
//
// It knows chunks and memory. Who is in the view, what is sent when and when a round ends is the
// Engine's business (engine.h).
#pragma once

#include <array>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "engine.h"

namespace decotrain {

constexpr double kNever = std::numeric_limits<double>::infinity();

inline SlotMask bit(std::uint8_t slot) { return slot < kMaxPeers ? SlotMask{1} << slot : 0; }

// Members of a view as sets of slots.
struct Roles {
  SlotMask all = 0;
  SlotMask active = 0;
  std::uint8_t self = kNoSlot;
  bool self_active() const { return (active & bit(self)) != 0; }
};

struct HeldContribution {
  std::uint8_t slot = kNoSlot;
  double weight = 1.0;
  const std::byte* bytes = nullptr;
  std::shared_ptr<const void> keep;
};

struct Chunk {
  // The value, when `held`; what the plan says it must be, when `fixed` and not held.
  bool held = false;
  bool fixed = false;
  std::uint8_t owner = kNoSlot;
  std::uint8_t sender = kNoSlot;  // in this view sends the value to whoever lacks it
  std::uint32_t bytes = 0;
  std::uint64_t digest = 0;
  ViewId born = 0;
  SlotMask contributors = 0;
  SlotMask holders = 0;  // who needs no value from us, as far as the plan knows
  const std::byte* value = nullptr;
  std::shared_ptr<const void> keep;

  // As owner.
  SlotMask received = 0;
  SlotMask waived = 0;
  double grace_at = kNever;
  std::vector<HeldContribution> contributions;
  std::shared_ptr<const float[]> lost;  // by this value, if it was combined here

  // As contributor.
  bool owner_has_ours = false;
  bool contribution_queued = false;
  SlotMask result_queued = 0;

  // The place in the round's result buffer: written once, by one receiver at a time.
  bool place_spent = false;
  std::weak_ptr<void> writer;
};

struct DoneSaid {
  std::uint64_t digest = 0;
  std::uint64_t state = 0;
};

struct ParkedFrame {
  PeerId from = 0;
  Header header;
  Incoming incoming;
};

// Where bytes may be written, and what owns them.
struct Place {
  std::byte* at = nullptr;
  std::shared_ptr<void> keep;
};

struct Round {
  std::uint32_t tag = 0;
  std::uint64_t seq = 0;
  RoundSpec spec;
  std::uint32_t spec_digest = 0;

  std::optional<RoundSpec> wanted;  // by our caller, who waits for a view: the others run `spec`

  bool known = false;    // the specification is
  bool open = false;     // takes frames; before, small ones are parked
  bool begun = false;    // by our caller
  bool planned = false;  // owners come from a plan, not from the view
  bool contributes = false;
  bool skips = false;
  bool stable_by_plan = false;
  std::uint64_t plan_digest = 0;  // what the round's digest must be, if stable by plan
  bool settled = false;           // stable, lost or left: waits to be handed over

  double weight = 0.0;
  std::uint64_t state_digest = 0;
  Snapshot snapshot;
  OwnerResidual owner_residual;
  std::size_t collect_bytes = 0;

  // When each slot's last contribution came here, our own with begin(); 0: none.
  std::array<double, kMaxPeers> arrived{};
  SlotMask skipped = 0;
  SlotMask opened = 0;  // who takes frames of this round, in this view
  SlotMask done_from = 0;
  std::array<DoneSaid, kMaxPeers> done{};
  bool complete = false;  // all values held, `digest` computed
  std::uint64_t digest = 0;
  double opened_at = 0.0;  // in this view
  double done_at = kNever;
  double look_at = kNever;  // for owners that are late with their results
  double few_at = kNever;   // since when only few of them are
  double next_grace = kNever;

  SlotMask named_late = 0;  // events already given
  SlotMask named_spec = 0;
  SlotMask named_waived = 0;
  bool named_open = false;
  bool named_diverged = false;
  std::array<std::uint8_t, kMaxPeers> corrupt{};  // payloads whose digest was wrong

  std::uint32_t missing = 0;
  std::vector<Chunk> chunks;
  std::array<PeerId, kMaxPeers> peers{};
  std::shared_ptr<std::byte[]> results;
  std::size_t place_bytes = 0;  // of one chunk in `results`
  std::vector<ParkedFrame> parked;
  std::size_t parked_bytes = 0;
  bool parked_lost = false;  // frames were dropped: ask for them when the round opens

  void set_spec(const RoundSpec& named);
  bool eager() const;
  // Owners of a round that no plan names: the same at every peer of the view.
  void lay_out_fresh(const View& view, const Roles& roles);
  void remember(const View& view);
  std::size_t contribution_bytes(std::uint32_t chunk) const;
  const std::byte* contribution(std::uint32_t chunk) const;
  // Whose word the owner of a chunk waits for.
  SlotMask required(std::uint32_t chunk, const Roles& roles) const;
  // The owner of a chunk that a plan gives to `named`.
  std::uint8_t home(std::uint32_t chunk, const Roles& roles, std::uint8_t named) const;
  // A place for a chunk's value that nobody else writes to.
  Place place(std::uint32_t chunk, std::size_t bytes);
  void set_value(std::uint32_t chunk, Place where, std::uint32_t bytes, std::uint64_t value_digest,
                 SlotMask contributors, ViewId born);
  void drop_value(std::uint32_t chunk);
  // Combines what the owner holds; false, and nothing has changed, when the sum is not finite.
  bool combine_chunk(std::uint32_t chunk, const Roles& roles, ViewId view,
                     const Engine::Memory& memory);
  // Takes out the contributions that are not finite; who they are from.
  SlotMask drop_not_finite(std::uint32_t chunk);
  void set_empty(std::uint32_t chunk, ViewId view);
  // The slot whose contribution came last, and how much later than the one before it.
  std::pair<std::uint8_t, double> slowest() const;
  std::uint64_t compute_digest() const;
  // Did an owner refuse a chunk of ours because of a value that `begin` had not looked at?
  bool withdrawn(std::uint8_t self) const;
  RoundResult result(Outcome outcome, ViewId view, std::uint8_t self) const;
  RoundReport report() const;
};

}  // namespace decotrain
