// The network thread of a peer and the queue in front of it.
#include "node.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

namespace decotrain {
namespace {

constexpr std::size_t kMaxNodeEvents = 4096;
constexpr const char* kThreadName = "decotrain-net";
constexpr const char* kNoMemory = "out of memory in a round or fetch";
constexpr std::uint64_t kChunksWanted = 16;
constexpr std::uint64_t kChunkStep = 4096;
constexpr std::uint64_t kChunkElementsMax = 65536;  // a few chunks fit a second-level cache

const char* name_of(EventKind kind) {
  switch (kind) {
    case EventKind::stable:
      return "stable";
    case EventKind::refused:
      return "refused";
    case EventKind::spec_mismatch:
      return "spec_mismatch";
    case EventKind::diverged:
      return "diverged";
    case EventKind::late_done:
      return "late_done";
    case EventKind::waived:
      return "waived";
    case EventKind::open:
      return "open";
  }
  return "unknown";
}

const char* name_of(net::MeshEvent::Kind kind) {
  switch (kind) {
    case net::MeshEvent::Kind::link_up:
      return "link_up";
    case net::MeshEvent::Kind::link_down:
      return "link_down";
    case net::MeshEvent::Kind::refused:
      return "refused";
    case net::MeshEvent::Kind::stranger:
      return "stranger";
    case net::MeshEvent::Kind::no_descriptors:
      return "no_descriptors";
  }
  return "unknown";
}

}  // namespace

// ---- Work

bool Work::wait(double timeout_s) {
  std::unique_lock lock(mutex_);
  const auto is_done = [this] { return done_; };
  if (timeout_s < 0.0) {
    changed_.wait(lock, is_done);
  } else if (!changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), is_done)) {
    return false;
  }
  if (!error_.empty()) throw NodeError(error_);
  return true;
}

bool Work::done() const {
  const std::lock_guard lock(mutex_);
  return done_;
}

std::optional<std::uint64_t> Work::seq() const {
  const std::lock_guard lock(mutex_);
  return seq_;
}

std::shared_ptr<const RoundResult> Work::result() const {
  const std::lock_guard lock(mutex_);
  return result_;
}

void Work::started(std::uint64_t seq) {
  const std::lock_guard lock(mutex_);
  seq_ = seq;
}

void Work::complete(std::shared_ptr<const RoundResult> result) {
  {
    const std::lock_guard lock(mutex_);
    if (done_) return;
    result_ = std::move(result);
    done_ = true;
  }
  changed_.notify_all();
}

void Work::fail(std::string error) {
  {
    const std::lock_guard lock(mutex_);
    if (done_) return;
    error_ = std::move(error);
    done_ = true;
  }
  changed_.notify_all();
}

std::uint32_t default_chunk_elements(std::uint64_t elements) {
  const std::uint64_t wanted =
      (elements / kChunksWanted + kChunkStep - 1) / kChunkStep * kChunkStep;
  std::uint64_t chunk = std::clamp(wanted, kChunkStep, kChunkElementsMax);
  while (elements > chunk * kMaxChunks) chunk *= 2;
  return static_cast<std::uint32_t>(chunk);
}

// ---- Node

Node::Node(PeerId self, const std::vector<std::string>& listen, const NodeOptions& options)
    : self_(self),
      event_fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      engine_(self, options.engine) {
  if (self == 0) throw std::invalid_argument("a peer id is not 0");
  if (!event_fd_) throw std::runtime_error("cannot make an eventfd");
  mesh_ = std::make_unique<net::Mesh>(self, listen, options.mesh, handler());
  addresses_ = mesh_->addresses();
  engine_.set_result_memory([this](std::size_t bytes) { return mesh_->lendable(bytes); });
  thread_ = std::thread([this] { run(); });
}

Node::~Node() { close(); }

void Node::close() {
  const std::lock_guard once(close_mutex_);
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  mesh_->wake();
  if (thread_.joinable()) thread_.join();
}

net::MeshHandler Node::handler() {
  const auto is_state = [](const Header& h) {
    return h.type == FrameType::state || h.type == FrameType::state_request;
  };
  return {
      .on_header =
          [this, is_state](PeerId from, const Header& h, bool arrived) {
            if (is_state(h)) return on_state_header(from, h);
            return engine_.on_header(from, h, net::Mesh::now(), arrived);
          },
      .on_payload =
          [this, is_state](PeerId from, const Header& h, Incoming incoming) {
            if (is_state(h)) return on_state_payload(from, h, incoming);
            engine_.on_payload(from, h, std::move(incoming), net::Mesh::now());
          },
      .next_frame = [this](PeerId to, OutFrame& frame) { return next_frame(to, frame); },
      .has_frames = [this](PeerId to) { return has_frames(to); },
      .on_link_reset =
          [this](PeerId peer) {
            store_.forget(peer);
            for (const Fetching& one : fetches_) one.fetch->on_link_reset(peer);
            engine_.on_link_reset(peer, net::Mesh::now());
          },
  };
}

// An exception here, in practice no memory, ends this peer's part and not its process: whoever
// waits is told why, and the others see closed sockets.
void Node::run() {
#ifdef __linux__
  ::pthread_setname_np(::pthread_self(), kThreadName);  // for top and debuggers
#endif
  try {
    while (turn()) {
    }
    finish(end_, false);
  } catch (const std::bad_alloc&) {
    finish(kNoMemory, true);
  } catch (const std::exception& error) {
    finish(std::string("the network thread failed: ") + error.what(), true);
  }
}

bool Node::turn() {
  if (!run_commands()) return false;
  const double now = net::Mesh::now();
  if (now >= engine_.next_deadline()) engine_.tick(now);
  start_waiting(now);
  finish_ready();
  run_fetches(now);
  forward_events();
  mesh_->run_once(next_deadline());
  return true;
}

void Node::finish(const std::string& why, bool broken) {
  broken_ = broken;
  {
    const std::lock_guard lock(mutex_);
    end_ = why;
    closing_ = true;
  }
  mesh_->shut();
  run_commands();
  fail_all(why);
  if (broken) emit({"broken", 0, 0, self_, why});
}

// False when the node is closing.
bool Node::run_commands() {
  bool closing = false;
  {
    const std::lock_guard lock(mutex_);
    for (Command& command : commands_) taken_.push_back(std::move(command));
    commands_.clear();
    closing = closing_;
  }
  while (!taken_.empty()) {
    const Command command = std::move(taken_.front());
    taken_.pop_front();
    command(net::Mesh::now());
  }
  return !closing;
}

void Node::post(Command command) {
  {
    const std::lock_guard lock(mutex_);
    if (closing_) throw NodeError(end_);
    commands_.push_back(std::move(command));
  }
  mesh_->wake();
}

std::shared_ptr<Work> Node::begin(BeginArgs args) {
  auto work = std::make_shared<Work>(args.tag);
  auto held = std::make_shared<BeginArgs>(std::move(args));
  post([this, work, held](double now) {
    const std::uint32_t tag = held->tag;
    waiting_.emplace(tag, Waiting{std::move(*held), work});
    if (!broken_) start_waiting(now);
  });
  return work;
}

void Node::chunks_ready(const std::shared_ptr<Work>& work, std::uint32_t chunks) {
  post([this, work, chunks](double now) {
    const std::uint32_t tag = work->tag();
    for (auto [one, end] = waiting_.equal_range(tag); one != end; ++one) {
      if (one->second.work == work) one->second.args.snapshot.ready = chunks;
    }
    for (auto [one, end] = open_.equal_range(tag); one != end; ++one) {
      if (one->second.work == work) engine_.chunks_ready(tag, one->second.seq, chunks, now);
    }
  });
}

void Node::abandon(const std::shared_ptr<Work>& work) {
  post([this, work](double now) {
    const std::uint32_t tag = work->tag();
    for (auto [one, end] = waiting_.equal_range(tag); one != end; ++one) {
      if (one->second.work == work) one->second.args.weight = 0.0;
    }
    for (auto [one, end] = open_.equal_range(tag); one != end; ++one) {
      if (one->second.work == work) engine_.abandon(tag, one->second.seq, now);
    }
  });
}

// A round waits while there is no view, or while too many of the tag are open. When results were
// missed the caller must take them first: it is told so, because it cannot know. With another
// specification than the others' it waits until a view has decided who goes.
void Node::start_waiting(double now) {
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    const std::uint32_t tag = it->first;
    Waiting& next = it->second;
    if (!engine_.missed(tag).empty()) {
      next.work->complete(nullptr);
    } else if (!engine_.may_begin(tag, next.args.spec.ahead) ||
               engine_.disputes(tag, next.args.spec)) {
      it = waiting_.upper_bound(tag);
      continue;
    } else {
      try {
        const std::uint64_t seq = engine_.begin(std::move(next.args), now);
        next.work->started(seq);
        open_.emplace(tag, Open{seq, next.work});
      } catch (const std::exception& error) {
        next.work->fail(error.what());
      }
    }
    it = waiting_.erase(it);
  }
}

void Node::finish_ready() {
  bool finished = false;
  for (auto it = open_.begin(); it != open_.end();) {
    if (!engine_.ready(it->first, it->second.seq)) {
      ++it;
      continue;
    }
    auto result =
        std::make_shared<const RoundResult>(engine_.take_result(it->first, it->second.seq));
    it->second.work->complete(std::move(result));
    it = open_.erase(it);
    finished = true;
  }
  if (finished) start_waiting(net::Mesh::now());
}

void Node::forward_events() {
  for (Event& event : engine_.take_events()) {
    // Ours are handed over through their Work; what is left was missed.
    if (event.kind == EventKind::stable && engine_.missed(event.tag).empty()) continue;
    emit({name_of(event.kind), event.tag, event.seq, event.peer, std::move(event.detail)});
  }
  for (net::MeshEvent& event : mesh_->take_events()) {
    emit({name_of(event.kind), 0, 0, event.peer, std::move(event.detail)});
  }
}

void Node::emit(NodeEvent event) {
  {
    const std::lock_guard lock(mutex_);
    if (events_.size() >= kMaxNodeEvents) return;
    events_.push_back(std::move(event));
  }
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(event_fd_.get(), &one, sizeof one);
}

std::vector<NodeEvent> Node::take_events() {
  const std::lock_guard lock(mutex_);
  std::uint64_t count = 0;
  [[maybe_unused]] const ssize_t n = ::read(event_fd_.get(), &count, sizeof count);
  return std::exchange(events_, {});
}

void Node::fail_all(const std::string& error) {
  for (auto& [tag, waiting] : waiting_) waiting.work->fail(error);
  for (auto& [tag, open] : open_) open.work->fail(error);
  for (const Fetching& one : fetches_) one.work->fail(error);
  waiting_.clear();
  open_.clear();
  fetches_.clear();
}

std::vector<std::uint64_t> Node::missed(std::uint32_t tag) {
  return call<std::vector<std::uint64_t>>([this, tag](double) { return engine_.missed(tag); });
}

std::vector<std::shared_ptr<const RoundResult>> Node::take_missed(std::uint32_t tag) {
  using Results = std::vector<std::shared_ptr<const RoundResult>>;
  return call<Results>([this, tag](double) {
    Results out;
    for (const std::uint64_t seq : engine_.missed(tag)) {
      out.push_back(std::make_shared<const RoundResult>(engine_.take_result(tag, seq)));
    }
    return out;
  });
}

void Node::declare(std::vector<std::pair<std::uint32_t, std::int64_t>> covered) {
  call<void>([this, covered = std::move(covered)](double) { engine_.declare(covered); });
}

void Node::set_covered(std::uint32_t tag, std::int64_t seq) {
  call<void>([this, tag, seq](double) { engine_.set_covered(tag, seq); });
}

Report Node::freeze(FreezeId id) {
  return call<Report>([this, id](double) { return engine_.freeze(id); });
}

bool Node::install(const Install& install) {
  return call<bool>([this, &install](double now) {
    const bool done = engine_.install(install, now);
    if (done) mesh_->reoffer(now);
    return done;
  });
}

void Node::set_peers(std::vector<net::PeerInfo> peers) {
  for (net::PeerInfo& info : peers) {
    std::vector<std::string> numeric;
    for (const std::string& text : info.addresses) {
      for (std::string& address : net::resolve(text)) numeric.push_back(std::move(address));
    }
    info.addresses = std::move(numeric);
  }
  call<void>([this, &peers](double now) { mesh_->set_peers(peers, now); });
}

void Node::set_route(PeerId peer, PeerId via) {
  call<void>([this, peer, via](double) { mesh_->set_route(peer, via); });
}

View Node::view() {
  return call<View>([this](double) { return engine_.view(); });
}

Node::Measures Node::measures() {
  return call<Measures>([this](double) {
    return Measures{mesh_->uplink_bps(), engine_.held_up_s(), mesh_->traffic()};
  });
}

std::vector<net::LinkStats> Node::links() {
  return call<std::vector<net::LinkStats>>([this](double) { return mesh_->stats(); });
}

}  // namespace decotrain
