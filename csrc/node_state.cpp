// The part of Node that moves shared state: its store and fetches on the network thread.
#include <algorithm>
#include <chrono>
#include <utility>

#include "node.h"

namespace decotrain {

bool FetchWork::wait(double timeout_s) {
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

bool FetchWork::wait_quiet(double timeout_s) {
  std::unique_lock lock(mutex_);
  const auto is_quiet = [this] { return done_ || progress_.under_way == 0; };
  return changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), is_quiet);
}

bool FetchWork::done() const {
  const std::lock_guard lock(mutex_);
  return done_;
}

StateProgress FetchWork::progress() const {
  const std::lock_guard lock(mutex_);
  return progress_;
}

void FetchWork::update(const StateProgress& progress, bool done) {
  {
    const std::lock_guard lock(mutex_);
    progress_ = progress;
    done_ = done_ || done;
  }
  if (done || progress.under_way == 0) changed_.notify_all();
}

void FetchWork::fail(std::string error) {
  {
    const std::lock_guard lock(mutex_);
    if (done_) return;
    error_ = std::move(error);
    done_ = true;
  }
  changed_.notify_all();
}

std::shared_ptr<FetchWork> Node::fetch(std::uint32_t tag, std::vector<PeerId> peers,
                                       StatePieces into, bool follows,
                                       std::shared_ptr<const void> keep, std::uint64_t kind) {
  if (into.bytes() == 0) throw std::invalid_argument("a fragment of no bytes is not fetched");
  auto work = std::make_shared<FetchWork>();
  post([this, tag, peers = std::move(peers), into = std::move(into), keep = std::move(keep), work,
        kind, follows](double) {
    auto fetch = std::make_unique<StateFetch>(tag, ++next_fetch_, into, peers, follows, kind);
    fetches_.push_back({std::move(fetch), work, keep});
  });
  return work;
}

void Node::set_fetch_peers(const std::shared_ptr<FetchWork>& work, std::vector<PeerId> peers) {
  call<void>([this, &work, &peers](double) {
    if (StateFetch* fetch = fetch_of(work)) fetch->set_peers(peers);
  });
}

StateFetch* Node::fetch_of(const std::shared_ptr<FetchWork>& work) {
  for (const Fetching& one : fetches_) {
    if (one.work == work) return one.fetch.get();
  }
  return nullptr;
}

void Node::pause_fetch(const std::shared_ptr<FetchWork>& work) {
  call<void>([this, &work](double) {
    StateFetch* const fetch = fetch_of(work);
    if (fetch == nullptr) return;
    fetch->pause();
    work->update(fetch->progress(), false);
  });
}

bool Node::lock_fetch(const std::shared_ptr<FetchWork>& work) {
  return call<bool>([this, &work](double) {
    StateFetch* const fetch = fetch_of(work);
    if (fetch == nullptr || !fetch->lock()) return false;
    work->update(fetch->progress(), false);
    return true;
  });
}

void Node::advance_fetch(const std::shared_ptr<FetchWork>& work, std::uint64_t version) {
  call<void>([this, &work, version](double) {
    StateFetch* const fetch = fetch_of(work);
    if (fetch == nullptr) return;
    fetch->advance(version);
    work->update(fetch->progress(), false);
  });
}

void Node::cancel(const std::shared_ptr<FetchWork>& work) {
  call<void>([this, &work](double) {
    std::erase_if(fetches_, [&](const Fetching& one) { return one.work == work; });
    work->fail("this fetch was cancelled");
  });
}

// Rounds go first. Requests are small; a megabyte of state waits until nothing else does.
bool Node::next_frame(PeerId to, OutFrame& frame) {
  if (engine_.next_frame(to, frame)) return true;
  if (!fetches_.empty()) {
    const double now = net::Mesh::now();
    for (const Fetching& one : fetches_) {
      frame = {};
      if (one.fetch->next_request(to, now, frame.header)) return true;
    }
  }
  return store_.next_reply(to, frame);
}

bool Node::has_frames(PeerId to) const {
  if (engine_.has_frames(to) || store_.has_reply(to)) return true;
  if (fetches_.empty()) return false;
  const double now = net::Mesh::now();
  return std::any_of(fetches_.begin(), fetches_.end(),
                     [&](const Fetching& one) { return one.fetch->has_request(to, now); });
}

Incoming Node::on_state_header(PeerId from, const Header& header) {
  if (header.type == FrameType::state_request) {
    store_.on_request(from, header);
    return {};
  }
  for (const Fetching& one : fetches_) {
    Incoming incoming = one.fetch->on_header(from, header, net::Mesh::now());
    if (incoming.accept == Accept::take) return incoming;
  }
  return {};
}

void Node::on_state_payload(PeerId from, const Header& header, const Incoming& incoming) {
  for (const Fetching& one : fetches_) {
    one.fetch->on_payload(from, header, incoming, net::Mesh::now());
  }
}

void Node::run_fetches(double now) {
  for (auto it = fetches_.begin(); it != fetches_.end();) {
    it->fetch->tick(now);
    const bool done = it->fetch->done();
    it->work->update(it->fetch->progress(), done);
    it = done ? fetches_.erase(it) : it + 1;
  }
}

double Node::next_deadline() const {
  double next = engine_.next_deadline();
  for (const Fetching& one : fetches_) next = std::min(next, one.fetch->next_deadline());
  return next;
}

}  // namespace decotrain
