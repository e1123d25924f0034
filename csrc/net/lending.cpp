// Mesh, fourth part: large payloads to peers of this host stay in memory that both have.
//
// The socket carries the header, and before it where the payload lies (`lend`); when nobody reads
// it any more its borrower says so (`returned`). Whatever stands in the way (no memory, a segment
// that the other side has not taken yet) the payload goes through the socket as ever: nothing here
// waits.
#include <algorithm>
#include <cstring>

#include "net/mesh.h"

namespace decotrain::net {
namespace {

constexpr std::size_t kLendFrom = 32 << 10;  // below, two copies cost less than a loan
constexpr std::size_t kMappedMax = std::size_t{4} << 30;
constexpr std::size_t kMappingsMax = 2 * kSegmentsMax;
constexpr std::uint64_t kLoansPerFrame = 64;

}  // namespace

std::shared_ptr<std::byte[]> Mesh::lendable(std::size_t bytes) {
  return lending_ == 0 || bytes < kLendFrom ? nullptr : arena_->allocate(bytes);
}

void Mesh::start_sharing(Stream& s) {
  if (!arena_ || !s.channel.is_unix()) return;
  s.channel.take_descriptors();
  s.sharing = std::make_unique<Sharing>(wake_.get());
  s.sharing->lends = s.far_takes_memory;
  lending_ += s.sharing->lends ? 1 : 0;
}

// The other side may read what we lent for as long as it likes: that memory is not used again.
void Mesh::stop_sharing(Stream& s) {
  if (!s.sharing) return;
  if (Link* link = link_of(s.peer)) {
    link->sent_bytes += s.sharing->lent_bytes;
    link->received_bytes += s.sharing->borrowed_bytes;
  }
  for (const auto& [number, loan] : s.sharing->lent) arena_->retire(loan.segment);
  lending_ -= s.sharing->lends ? 1 : 0;
  s.sharing.reset();
}

// ---- as lender

// True when the payload need not go through the socket: it lies in a segment that the other side
// has, or was copied to one.
bool Mesh::lend(Stream& s, OutFrame& frame) {
  Sharing& sharing = *s.sharing;
  const std::size_t bytes = frame.header.payload_bytes;
  const FrameType type = frame.header.type;
  // Other payloads would be copied in and out, as they are through the socket.
  const bool of_rounds = type == FrameType::contribution || type == FrameType::result;
  if (!sharing.lends || !of_rounds || bytes < kLendFrom) return false;
  auto where = arena_->find(frame.payload, bytes);
  std::shared_ptr<const void> keep = frame.keep;
  if (where) {
    if (!offered(s, where->segment)) return false;
  } else {
    const auto block = arena_->allocate(bytes);
    if (block != nullptr) where = arena_->find(block.get(), bytes);
    if (!where || !offered(s, where->segment)) return false;
    std::memcpy(block.get(), frame.payload, bytes);
    keep = block;
  }
  Stream::Out out;
  out.frame.header.type = FrameType::lend;
  out.frame.header.a = where->segment;
  out.frame.header.b = where->offset;
  out.frame.header.c = sharing.next_loan;
  push_back(s, std::move(out));
  sharing.lent.emplace(sharing.next_loan++, Sharing::Lent{where->segment, std::move(keep)});
  sharing.lent_bytes += bytes;
  frame.keep.reset();
  return true;
}

// Has the other side taken this segment? If it was never asked, it is now.
bool Mesh::offered(Stream& s, std::uint32_t segment) {
  Sharing& sharing = *s.sharing;
  const auto known = sharing.segments.find(segment);
  if (known != sharing.segments.end()) return known->second;
  if (sharing.asked) return false;
  const Arena::File file = arena_->file(segment);
  if (file.fd < 0) return false;
  Stream::Out out;
  out.frame.header.type = FrameType::memory;
  out.frame.header.a = segment;
  out.frame.header.b = file.bytes;
  out.frame.keep = file.keep;
  out.descriptor = file.fd;
  write(out.frame.header, out.header);
  s.out.push_back(std::move(out));
  sharing.segments.emplace(segment, false);
  sharing.asked = segment;
  return false;
}

void Mesh::say_gone(Stream& s, std::uint32_t segment) {
  Header gone;
  gone.type = FrameType::memory;
  gone.a = segment;
  push_control(s, gone);
  mark_ready(s);
}

void Mesh::trim_arena(Clock at) {
  if (!arena_) return;
  const std::vector<std::uint32_t> dropped = arena_->trim(at);
  for (const std::uint32_t segment : dropped) {
    for (auto& [id, s] : streams_) {
      if (!s->live() || !s->sharing || s->sharing->asked == segment) continue;
      if (s->sharing->segments.erase(segment) != 0) say_gone(*s, segment);
    }
  }
}

// ---- frames; false when the stream is closed

bool Mesh::on_sharing_frame(Stream& s, Clock at) {
  s.has_header = false;
  const char* wrong = "shared memory out of place";
  if (!s.sharing || s.in.payload_bytes != 0) {
    // refused below
  } else if (s.in.type == FrameType::lend) {
    wrong = take_lend(s);
  } else if (s.in.type == FrameType::returned) {
    wrong = take_returned(s);
  } else {
    wrong = (s.in.flags & kFlagReply) != 0 ? take_answer(s) : take_memory(s);
  }
  if (*wrong == '\0') return true;
  emit(MeshEvent::Kind::refused, s.peer, wrong);
  close(s, std::string("refused: ") + wrong, at);
  return false;
}

// A segment that the other side lends from, or (no bytes) will lend from no more.
const char* Mesh::take_memory(Stream& s) {
  Sharing& sharing = *s.sharing;
  if (s.in.a > 0xffffffff) return "a segment with an impossible number";
  const auto segment = static_cast<std::uint32_t>(s.in.a);
  const auto known = sharing.mappings.find(segment);
  if (s.in.b == 0) {
    if (known == sharing.mappings.end()) return "";
    sharing.mapped_bytes -= known->second->bytes();
    sharing.mappings.erase(known);
    return "";
  }
  if (known != sharing.mappings.end()) return "a segment that was there";
  const Fd fd = s.channel.next_descriptor();
  std::shared_ptr<const Mapping> mapping;
  if (sharing.mappings.size() < kMappingsMax && sharing.mapped_bytes < kMappedMax) {
    mapping = Mapping::of(fd, s.in.b);
  }
  Header answer = s.in;
  answer.flags = kFlagReply;
  answer.c = mapping != nullptr ? 1 : 0;
  if (mapping != nullptr) {
    sharing.mapped_bytes += mapping->bytes();
    sharing.mappings.emplace(segment, std::move(mapping));
  }
  push_control(s, answer);
  mark_ready(s);
  return "";
}

const char* Mesh::take_answer(Stream& s) {
  Sharing& sharing = *s.sharing;
  if (!sharing.asked || *sharing.asked != s.in.a) return "an answer without a question";
  const std::uint32_t segment = *sharing.asked;
  sharing.asked.reset();
  sharing.segments[segment] = s.in.c == 1;
  if (arena_->file(segment).fd < 0) {  // dropped while it was offered
    sharing.segments.erase(segment);
    say_gone(s, segment);
  }
  if (s.in.c != 1 && sharing.lends) {
    sharing.lends = false;  // of this stream: it goes on through the socket
    --lending_;
  }
  return "";
}

const char* Mesh::take_lend(Stream& s) {
  Sharing& sharing = *s.sharing;
  const auto of = s.in.a <= 0xffffffff ? sharing.mappings.find(static_cast<std::uint32_t>(s.in.a))
                                       : sharing.mappings.end();
  if (of == sharing.mappings.end()) return "a loan of no segment";
  if (s.in.b >= of->second->bytes()) return "a loan beyond its segment";
  if (sharing.announced) return "a loan without a frame";
  sharing.announced =
      std::make_shared<Loan>(of->second, sharing.returns, static_cast<std::size_t>(s.in.b), s.in.c);
  return "";
}

const char* Mesh::take_returned(Stream& s) {
  for (std::uint64_t i = 0; i < kLoansPerFrame; ++i) {
    if ((s.in.b >> i & 1) == 0) continue;
    if (s.sharing->lent.erase(s.in.a + i) == 0) return "a loan returned that was not out";
  }
  return "";
}

std::size_t Mesh::lent() const {
  std::size_t out = 0;
  for (const auto& [id, s] : streams_) out += s->sharing ? s->sharing->lent.size() : 0;
  return out;
}

std::uint64_t Mesh::lent_so_far() const {
  std::uint64_t out = 0;
  for (const auto& [id, s] : streams_) out += s->sharing ? s->sharing->lent_bytes : 0;
  return out;
}

// ---- as borrower

bool Mesh::fits(const Loan& loan, std::size_t bytes) {
  return bytes <= loan.mapping->bytes() - loan.offset;
}

// The payload of the frame just accepted is here: it stays where it is, or is copied to where its
// taker wants it.
void Mesh::take_loan(Stream& s) {
  const std::shared_ptr<Loan> loan = std::move(s.sharing->announced);
  s.sharing->announced.reset();
  s.sharing->borrowed_bytes += s.in.payload_bytes;
  s.in_got = s.in.payload_bytes;
  if (s.incoming.accept != Accept::take || s.in.payload_bytes == 0) return;
  const std::byte* const from = loan->mapping->data() + loan->offset;
  if (s.incoming.target != nullptr) {
    std::memcpy(s.incoming.target, from, s.in.payload_bytes);
    return;
  }
  s.incoming.target = const_cast<std::byte*>(from);  // who takes it there only reads
  s.incoming.keep = loan;
}

void Mesh::return_loans(Stream& s) {
  if (!s.sharing || !s.live()) return;
  std::vector<std::uint64_t> loans = s.sharing->returns->take();
  if (loans.empty()) return;
  std::sort(loans.begin(), loans.end());
  Header back;
  back.type = FrameType::returned;
  for (const std::uint64_t loan : loans) {
    if (back.b != 0 && loan - back.a >= kLoansPerFrame) {
      push_control(s, back);
      back.b = 0;
    }
    if (back.b == 0) back.a = loan;
    back.b |= std::uint64_t{1} << (loan - back.a);
  }
  push_control(s, back);
  mark_ready(s);
}

}  // namespace decotrain::net
