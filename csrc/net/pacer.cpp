#include "net/pacer.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace decotrain::net {
namespace {

constexpr double kBusyShare = 0.8;      // of a measurement, else it says nothing of the path
constexpr double kStillGrowing = 1.25;  // by so much from one measurement to the next: slow start
constexpr double kOverrun = 0.02;       // resent share that one lost packet in a thousand is not
constexpr double kProbeGain = 1.08;
constexpr double kDrainGain = 0.93;
constexpr double kProbeWorked = 1.03;
constexpr std::size_t kProbeLasts = 2;  // the first still sees the rate before
constexpr std::size_t kProbeEvery = 6;
constexpr double kQueueMin_s = 0.005;  // later than this, and an eighth of the path: a queue
constexpr double kQueueShare = 0.125;
constexpr double kLateTurns = 2.0;  // between two looks: there was a pause
constexpr double kAlike = 0.8;      // of an equal share: less is a path's own limit
constexpr double kRaised = 1.15;    // at most, above what was learnt

}  // namespace

void Pacer::observe(const PathProgress& change, double time_s, double busy_s) {
  if (time_s <= 0.0) return;
  const double rate = static_cast<double>(change.delivered_bytes) / time_s;
  const bool busy = busy_s >= kBusyShare * time_s;
  if (!busy) {
    // What was sent in pauses can only show that there is more than we thought.
    if (full_ && rate > best()) remember(rate);
    before_ = 0.0;
    return;
  }
  const auto resent = static_cast<double>(change.resent_bytes);
  const bool overrun = resent > kOverrun * static_cast<double>(change.delivered_bytes);
  if (!full_) {
    full_ = overrun || (before_ != 0.0 && rate < kStillGrowing * before_);
    before_ = rate;
    remember(rate);
    return;
  }
  if (overrun) {
    rates_.fill(0.0);
    next_ = 0;
  }
  const double known = best();
  remember(rate);
  ++steady_;
  const double queue_s = change.rtt_s - change.rtt_min_s;
  const bool queued = queue_s > std::max(kQueueMin_s, kQueueShare * change.rtt_min_s);
  if (gain_ > 1.0) {
    if (overrun || queued) {
      gain_ = kDrainGain;
    } else if (steady_ < kProbeLasts || rate > kProbeWorked * known) {
      if (steady_ >= kProbeLasts) steady_ = 0;
      return;
    } else {
      gain_ = 1.0;
    }
    steady_ = 0;
  } else if (gain_ < 1.0) {
    gain_ = 1.0;
    steady_ = 0;
  } else if (queued || overrun) {
    gain_ = kDrainGain;
    steady_ = 0;
  } else if (steady_ >= kProbeEvery) {
    gain_ = kProbeGain;
    steady_ = 0;
  }
}

double Pacer::ceiling() const { return full_ ? gain_ * best() : 0.0; }

void Pacer::remember(double rate) {
  rates_[next_] = rate;
  next_ = (next_ + 1) % rates_.size();
}

PathProgress& PathProgress::operator+=(const PathProgress& other) {
  delivered_bytes += other.delivered_bytes;
  resent_bytes += other.resent_bytes;
  rtt_s += other.rtt_s;
  rtt_min_s += other.rtt_min_s;
  return *this;
}

void PathWatch::look(const PathProgress& sum, std::size_t streams, double now_s, double turn_s) {
  const PathProgress mark = std::exchange(mark_, sum);
  const double time_s = now_s - std::exchange(at_s_, now_s);
  const double busy = std::exchange(busy_s, 0.0);
  const bool same = std::exchange(streams_, streams) == streams;
  if (streams == 0 || !same || time_s > kLateTurns * turn_s ||
      sum.delivered_bytes < mark.delivered_bytes || sum.resent_bytes < mark.resent_bytes) {
    return;
  }
  const auto each = static_cast<double>(streams);
  pacer.observe({sum.delivered_bytes - mark.delivered_bytes, sum.resent_bytes - mark.resent_bytes,
                 sum.rtt_s / each, sum.rtt_min_s / each},
                time_s, busy);
}

std::vector<double> level(const std::vector<double>& ceilings, double total) {
  std::vector<std::size_t> order(ceilings.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return ceilings[a] < ceilings[b]; });
  double rest = std::accumulate(ceilings.begin(), ceilings.end(), 0.0);
  if (total > 0.0) rest = std::min(rest, total);
  std::size_t left = order.size();
  std::vector<double> out(ceilings);
  for (const std::size_t i : order) {
    const double share = rest / static_cast<double>(left);
    if (ceilings[i] >= kAlike * share) out[i] = std::min(share, kRaised * ceilings[i]);
    rest -= out[i];
    --left;
  }
  return out;
}

double Pacer::best() const { return *std::max_element(rates_.begin(), rates_.end()); }

}  // namespace decotrain::net
