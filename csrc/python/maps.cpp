#include "maps.h"

#include <nanobind/stl/string.h>

#include <cstring>
#include <string>

namespace nb = nanobind;

namespace decotrain {
namespace {

template <class Word, class Chunk, class Field>
nb::bytes column(const std::vector<Chunk>& chunks, Field field) {
  std::string out;
  out.reserve(chunks.size() * sizeof(Word));
  for (const Chunk& chunk : chunks) {
    const auto word = static_cast<Word>(field(chunk));
    for (std::size_t i = 0; i < sizeof(Word); ++i) {
      out.push_back(static_cast<char>(static_cast<std::uint64_t>(word) >> (8 * i) & 0xff));
    }
  }
  return nb::bytes(out.data(), out.size());
}

[[noreturn]] void bad(const char* field) {
  throw nb::value_error((std::string("install: field '") + field + "' is missing or bad").c_str());
}

nb::object item(const nb::dict& map, const char* field) {
  const nb::str key(field);
  if (!map.contains(key)) bad(field);
  return map[key];
}

template <class T>
T as(const nb::handle& value, const char* field) {
  T out{};
  if (!nb::try_cast<T>(value, out, false)) bad(field);
  return out;
}

template <class T>
T number(const nb::dict& map, const char* field) {
  return as<T>(item(map, field), field);
}

// Python's bool is an int; shares may be written as ints.
double real(const nb::handle& value, const char* field) {
  double out = 0.0;
  if (!nb::try_cast<double>(value, out)) bad(field);
  return out;
}

nb::list sequence(const nb::handle& value, const char* field, std::size_t length = 0) {
  if (!nb::isinstance<nb::list>(value) && !nb::isinstance<nb::tuple>(value)) bad(field);
  nb::list out(value);
  if (length != 0 && out.size() != length) bad(field);
  return out;
}

nb::dict entry(const nb::handle& value, const char* field) {
  if (!nb::isinstance<nb::dict>(value)) bad(field);
  return nb::borrow<nb::dict>(value);
}

nb::bytes blob(const nb::dict& map, const char* field) {
  nb::object value = item(map, field);
  if (!nb::isinstance<nb::bytes>(value)) bad(field);
  return nb::borrow<nb::bytes>(value);
}

template <class Word, class Set>
void read_column(const nb::dict& map, const char* field, std::vector<ChunkPlan>& chunks, Set set) {
  const nb::bytes bytes = blob(map, field);
  if (bytes.size() != chunks.size() * sizeof(Word)) bad(field);
  const auto* at = reinterpret_cast<const unsigned char*>(bytes.c_str());
  for (ChunkPlan& chunk : chunks) {
    std::uint64_t word = 0;
    for (std::size_t i = 0; i < sizeof(Word); ++i) word |= std::uint64_t{*at++} << (8 * i);
    set(chunk, static_cast<Word>(word));
  }
}

RoundPlan round_from_map(const nb::dict& map) {
  RoundPlan plan;
  plan.tag = number<std::uint32_t>(map, "tag");
  plan.seq = number<std::uint64_t>(map, "seq");
  plan.stable = number<bool>(map, "stable");
  plan.digest = number<std::uint64_t>(map, "round_digest");
  const nb::bytes packed = blob(map, "spec");
  const auto spec =
      unpack_spec({reinterpret_cast<const std::byte*>(packed.c_str()), packed.size()});
  if (!spec) bad("spec");
  plan.spec = *spec;
  const std::size_t chunks = blob(map, "owner").size();
  if (chunks != chunk_count(plan.spec)) bad("owner");
  plan.chunks.resize(chunks);
  using U8 = std::uint8_t;
  using U64 = std::uint64_t;
  read_column<U8>(map, "kind", plan.chunks,
                  [](ChunkPlan& c, U8 v) { c.kind = static_cast<ChunkPlan::Kind>(v); });
  read_column<U8>(map, "owner", plan.chunks, [](ChunkPlan& c, U8 v) { c.owner = v; });
  read_column<U64>(map, "received", plan.chunks, [](ChunkPlan& c, U64 v) { c.received = v; });
  read_column<U64>(map, "digest", plan.chunks, [](ChunkPlan& c, U64 v) { c.digest = v; });
  read_column<U64>(map, "born", plan.chunks, [](ChunkPlan& c, U64 v) { c.born = v; });
  read_column<U64>(map, "holders", plan.chunks, [](ChunkPlan& c, U64 v) { c.holders = v; });
  read_column<U64>(map, "contributors", plan.chunks,
                   [](ChunkPlan& c, U64 v) { c.contributors = v; });
  return plan;
}

nb::dict to_map(const RoundReport& round) {
  nb::dict one;
  one["tag"] = round.tag;
  one["seq"] = round.seq;
  const auto spec = pack(round.spec);
  one["spec"] = nb::bytes(reinterpret_cast<const char*>(spec.data()), spec.size());
  one["begun"] = round.begun;
  one["skipped"] = round.skipped;
  using C = ChunkReport;
  one["owner"] = column<std::uint8_t>(round.chunks, [](const C& c) { return c.owner; });
  one["received"] = column<std::uint64_t>(round.chunks, [](const C& c) { return c.received; });
  one["born"] = column<std::uint64_t>(round.chunks, [](const C& c) { return c.born; });
  one["digest"] = column<std::uint64_t>(round.chunks, [](const C& c) { return c.digest; });
  one["contributors"] =
      column<std::uint64_t>(round.chunks, [](const C& c) { return c.contributors; });
  return one;
}

}  // namespace

nb::dict to_map(const Report& report) {
  nb::list tags;
  for (const TagReport& tag : report.tags) {
    nb::list stable;
    for (const auto& [seq, round_digest] : tag.stable) {
      nb::list pair;
      pair.append(seq);
      pair.append(round_digest);
      stable.append(pair);
    }
    nb::dict one;
    one["tag"] = tag.tag;
    one["state"] = tag.state;
    one["covered"] = tag.covered;
    one["stable"] = stable;
    tags.append(one);
  }
  nb::list rounds;
  for (const RoundReport& round : report.rounds) rounds.append(to_map(round));
  nb::dict map;
  map["installed"] = report.installed;
  map["declared"] = report.declared;
  nb::list names;
  for (const auto& [slot, peer] : report.names) {
    nb::list pair;
    pair.append(slot);
    pair.append(peer);
    names.append(pair);
  }
  map["tags"] = tags;
  map["rounds"] = rounds;
  map["names"] = names;
  return map;
}

nb::dict to_map(const View& view) {
  nb::list members;
  for (const Member& member : view.members) {
    nb::list one;
    one.append(member.peer);
    one.append(member.slot);
    one.append(member.active);
    one.append(member.share);
    members.append(one);
  }
  nb::dict map;
  map["id"] = view.id;
  map["members"] = members;
  return map;
}

Install install_from_map(const nb::dict& map) {
  Install plan;
  const nb::dict view = entry(item(map, "view"), "view");
  plan.view.id = number<std::uint64_t>(view, "id");
  for (const nb::handle one : sequence(item(view, "members"), "members")) {
    const nb::list fields = sequence(one, "members", 4);
    Member member;
    member.peer = as<std::uint64_t>(fields[0], "members");
    member.slot = as<std::uint8_t>(fields[1], "members");
    member.active = as<bool>(fields[2], "members");
    member.share = real(fields[3], "members");
    plan.view.members.push_back(member);
  }
  const nb::list answers = sequence(item(map, "answers"), "answers", 2);
  plan.answers.term = as<std::uint32_t>(answers[0], "answers");
  plan.answers.number = as<std::uint64_t>(answers[1], "answers");
  plan.reported = number<std::uint64_t>(map, "reported");
  for (const nb::handle one : sequence(item(map, "tags"), "tags")) {
    const nb::dict tag = entry(one, "tags");
    plan.tags.push_back({number<std::uint32_t>(tag, "tag"), number<std::int64_t>(tag, "stable"),
                         number<std::uint64_t>(tag, "digest")});
  }
  for (const nb::handle one : sequence(item(map, "rounds"), "rounds")) {
    plan.rounds.push_back(round_from_map(entry(one, "rounds")));
  }
  for (const nb::handle one : sequence(item(map, "names"), "names")) {
    const nb::list pair = sequence(one, "names", 2);
    plan.names.emplace_back(as<std::uint8_t>(pair[0], "names"),
                            as<std::uint64_t>(pair[1], "names"));
  }
  return plan;
}

}  // namespace decotrain
