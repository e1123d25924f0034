// The small coordinator of the test world: plans from reports alone, as docs/protocol.md says.
#include <algorithm>
#include <bit>

#include "world.h"

namespace decotrain::test {
namespace {

std::uint64_t bit_of(std::uint8_t slot) { return slot < 64 ? std::uint64_t{1} << slot : 0; }

const RoundReport* find(const Report& report, std::uint32_t tag, std::uint64_t seq) {
  for (const RoundReport& one : report.rounds) {
    if (one.tag == tag && one.seq == seq) return &one;
  }
  return nullptr;
}

}  // namespace

void World::change_view(bool lossy) {
  const FreezeId id{1, ++freeze_number_};
  std::map<std::size_t, Report> reports;
  std::vector<std::size_t> in;
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    if (!peers_[i].alive) continue;
    in.push_back(i);
    for (std::uint64_t k = lossy ? random(6) : 0; k > 0; --k) move(false);
    if (lossy && random(10) == 0) continue;  // its report is not heard, or it hears no FREEZE
    reports[i] = peers_[i].engine->freeze(id);
    if (lossy && random(12) == 0) reports.erase(i);
    if (lossy && random(4) == 0) late_install();
  }
  if (reports.empty() || (lossy && random(10) == 0)) return;  // the coordinator died
  // Nobody decides without an active peer of the last view (V10).
  bool someone = freeze_number_ == 1;
  for (const auto& [i, report] : reports) {
    for (const Member& member : peers_[i].engine->view().members) {
      someone =
          someone || (report.installed == view_id_ && member.active && member.peer == peers_[i].id);
    }
  }
  if (!someone && lossy) return;
  if (!someone) new_generation(reports);
  const Install made = plan(reports, in, !someone);
  view_id_ = made.view.id;
  installs_.push_back(made);
  for (const std::size_t i : in) {
    for (std::uint64_t k = lossy ? random(6) : 0; k > 0; --k) move(false);
    if (lossy && random(4) == 0) late_install();
    if (lossy && random(10) == 0) continue;
    if (peers_[i].alive) install(peers_[i], made);
  }
}

// From the most advanced living peer; what the others hold beside it is void (V10, V11).
void World::new_generation(std::map<std::size_t, Report>& reports) {
  std::size_t base = reports.begin()->first;
  auto rank = [&](std::size_t i) {
    std::int64_t rounds = 0;
    for (const auto& [tag, state] : peers_[i].state) rounds += state.version;
    return std::tuple(reports[i].installed, !peers_[i].needs_fetch, rounds);
  };
  for (const auto& [i, report] : reports) base = rank(i) > rank(base) ? i : base;
  for (Peer& one : peers_) {
    one.needs_fetch = one.id != peers_[base].id;
    if (one.needs_fetch) forget(one.id);
  }
  std::erase_if(reports, [&](const auto& one) { return one.first != base; });
}

Install World::plan(const std::map<std::size_t, Report>& reports,
                    const std::vector<std::size_t>& in, bool fresh) {
  Install out;
  out.answers = {1, freeze_number_};
  out.view.id = view_id_ + 1;
  std::map<std::uint8_t, Report> by_slot;
  for (const auto& [i, report] : reports) by_slot[peers_[i].slot] = report;
  plan_tags(by_slot, fresh, out);
  for (const std::size_t i : in) {
    const std::uint8_t slot = peers_[i].slot;
    bool covers = by_slot.count(slot) != 0;
    for (const TagPlan& tag : out.tags) {
      std::int64_t covered = -1;
      for (const TagReport& one : covers ? by_slot[slot].tags : std::vector<TagReport>{}) {
        if (one.tag == tag.tag) covered = one.state ? one.covered : tag.stable;
      }
      covers = covers && covered >= tag.stable && !peers_[i].needs_fetch;
    }
    if (by_slot.count(slot) != 0) out.reported |= bit_of(slot);
    out.view.members.push_back({peers_[i].id, slot, covers, 1.0});
  }
  std::set<std::pair<std::uint32_t, std::uint64_t>> rounds;
  for (const auto& [slot, report] : by_slot) {
    for (const RoundReport& one : report.rounds) rounds.insert({one.tag, one.seq});
  }
  std::map<std::uint8_t, PeerId> names;
  for (const auto& [slot, report] : by_slot) names.insert(report.names.begin(), report.names.end());
  out.names.assign(names.begin(), names.end());
  for (const auto& [tag, seq] : rounds) {
    // A new generation may go back behind rounds that were open.
    const auto ahead = [&](const TagPlan& of) {
      return of.tag == tag && static_cast<std::int64_t>(seq) > of.stable + 2 + options_.ahead;
    };
    if (std::any_of(out.tags.begin(), out.tags.end(), ahead)) continue;
    RoundPlan one = plan_round(by_slot, out, tag, seq);
    if (!one.chunks.empty() || one.spec.elements == 0) out.rounds.push_back(std::move(one));
  }
  return out;
}

void World::plan_tags(const std::map<std::uint8_t, Report>& reports, bool fresh, Install& out) {
  std::map<std::uint32_t, TagPlan> tags;
  for (const auto& [slot, report] : reports) {
    for (const TagReport& one : report.tags) {
      TagPlan& tag = tags.try_emplace(one.tag, TagPlan{one.tag, -1, 0}).first->second;
      if (one.covered > tag.stable) tag = {one.tag, one.covered, 0};
      for (const auto& [seq, digest] : one.stable) {
        const auto at = static_cast<std::int64_t>(seq);
        // A new generation goes on from what its base has, not from what it knows of.
        if (at > tag.stable && fresh) continue;
        if (at >= tag.stable) tag = {one.tag, at, digest};
      }
    }
  }
  for (const auto& [id, tag] : tags) out.tags.push_back(tag);
}

RoundPlan World::plan_round(const std::map<std::uint8_t, Report>& reports, const Install& view,
                            std::uint32_t tag, std::uint64_t seq) {
  RoundPlan out;
  out.tag = tag;
  out.seq = seq;
  for (const TagPlan& one : view.tags) {
    if (one.tag == tag) out.stable = static_cast<std::int64_t>(seq) <= one.stable;
  }
  bool begun = false;
  bool any_value = false;
  for (const auto& [slot, report] : reports) {
    for (const TagReport& of : report.tags) {
      for (const auto& [number, digest] : of.stable) {
        if (of.tag == tag && number == seq && out.stable) out.digest = digest;
      }
    }
    const RoundReport* const one = find(report, tag, seq);
    if (one == nullptr) continue;
    begun = begun || one->begun;
    out.spec = one->spec;
  }
  std::vector<std::uint8_t> active;
  for (const Member& one : view.view.members) {
    if (one.active) active.push_back(one.slot);
  }
  for (std::uint32_t c = 0; c < chunk_count(out.spec); ++c) {
    ChunkPlan chunk;
    ViewId newest = 0;
    SlotMask received = 0;
    for (const auto& [slot, report] : reports) {
      const RoundReport* const one = find(report, tag, seq);
      if (one == nullptr) continue;
      const ChunkReport& said = one->chunks[c];
      if (said.born > chunk.born) {
        chunk = {ChunkPlan::Kind::value, kNoSlot, 0, said.digest, said.born, 0, said.contributors};
      }
      if (said.born != 0 && said.born == chunk.born) chunk.holders |= bit_of(slot);
      if (said.owner != kNoSlot && report.installed >= newest) {
        newest = report.installed;
        if (chunk.kind == ChunkPlan::Kind::owner) chunk.owner = said.owner;
      }
    }
    any_value = any_value || chunk.born != 0;
    if (out.stable && chunk.kind == ChunkPlan::Kind::owner) chunk.kind = ChunkPlan::Kind::value;
    if (chunk.kind == ChunkPlan::Kind::value) {
      chunk.owner = kNoSlot;
    } else {
      const auto report = reports.find(chunk.owner);
      const RoundReport* const own =
          report == reports.end() ? nullptr : find(report->second, tag, seq);
      const bool stays = own != nullptr && own->chunks[c].owner == chunk.owner &&
                         std::count(active.begin(), active.end(), chunk.owner) != 0;
      if (stays) received = own->chunks[c].received;
      if (!stays) chunk.owner = active.empty() ? kNoSlot : active[c % active.size()];
      chunk.received = received;
    }
    out.chunks.push_back(chunk);
  }
  if (!begun && !any_value) {
    out.chunks.clear();
    out.spec.elements = 1;  // named by nobody: not planned
  }
  return out;
}

std::string World::describe() {
  std::string out;
  for (Peer& one : peers_) {
    if (!one.alive) continue;
    Engine& engine = *one.engine;
    out += "\npeer " + std::to_string(one.id) + " slot " + std::to_string(one.slot) + " view " +
           std::to_string(engine.view().id & 0xffffffff) + (engine.frozen() ? " frozen" : "") +
           (one.needs_fetch ? " needs fetch" : "");
    for (const Member& member : engine.view().members) {
      if (member.peer == one.id) out += member.active ? " active" : " observing";
    }
    for (const auto& [tag, state] : one.state) {
      out += "; tag " + std::to_string(tag) + " version " + std::to_string(state.version) +
             " next " + std::to_string(engine.next(tag)) + (one.begun[tag].empty() ? "" : " begun");
    }
    // An old FREEZE stops nothing and still gives a report.
    for (const RoundReport& round : engine.freeze({0, 0}).rounds) {
      out += "\n   " + std::to_string(round.tag) + "/" + std::to_string(round.seq) +
             (round.begun ? " begun" : "") + " skipped " + std::to_string(round.skipped) + ":";
      for (std::size_t c = 0; c < round.chunks.size() && c < 8; ++c) {
        const ChunkReport& chunk = round.chunks[c];
        out += chunk.born != 0 ? " v" + std::to_string(chunk.born & 0xffffffff)
                               : " o" + std::to_string(chunk.owner) + "(" +
                                     std::to_string(chunk.received) + ")";
      }
    }
  }
  return out;
}

}  // namespace decotrain::test
