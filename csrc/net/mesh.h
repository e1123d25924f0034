// Mesh: the links of one peer to the others. It dials and accepts, keeps streams alive, moves
// frames between their memory and the kernel, and relays for pairs that cannot reach each other.
//
// It does not know rounds: what a frame means and where its payload goes is the handler's business.
// It does not decide membership: `set_peers` tells it who exists. One thread calls everything.
//
// Security: with a key, TCP is TLS (tls.h); Unix sockets are for processes of our own user. Until a
// connection has shown a valid hello for this run it has a place among a few, the oldest of which
// goes first.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "net/stream.h"

namespace decotrain::net {

constexpr std::uint32_t kProtocolVersion = 1;
constexpr std::size_t kMaxStreams = 16;    // of one link
constexpr std::size_t kMaxStrangers = 64;  // connections without a valid hello
constexpr std::size_t kMaxStrangersPerOrigin = 32;
constexpr std::size_t kRelayBytes = std::size_t{8} << 20;  // held for one destination
constexpr std::size_t kMaxEvents = 1024;

// Streams to begin with, when their number is left to us. What one stream carries over a long path
// is bounded by what the kernel buffers for it and, unless it is BBR, by loss: CUBIC falls back at
// every lost packet and takes seconds to recover.
std::size_t streams_for(double rtt_s, bool fears_loss);

struct MeshOptions {
  std::uint64_t run_fingerprint = 0;
  std::string tls_key;      // kTlsKeyBytes, of everybody; empty: TCP is plain, unless
  bool pair_keys = false;   // only those may talk whose pair has a key (PeerInfo)
  std::size_t streams = 0;  // of one link; 0: as many as the path needs
  bool force_tcp = false;   // no Unix sockets (for benchmarks)
  std::size_t shared_bytes = std::size_t{256} << 20;  // lent to peers of this host; 0: none
  double link_timeout_s = 5.0;  // no progress for this long: the stream is closed
  double ping_interval_s = 1.0;
  double handshake_timeout_s = 5.0;
  double dial_patience_s = 2.0;  // then the larger peer id dials too
  double backoff_min_s = 0.05, backoff_max_s = 2.0;
  std::size_t io_bytes = std::size_t{1} << 20;  // of one system call
  SocketOptions socket;
};

// All called on the thread that runs the Mesh. See Engine for the meaning.
struct MeshHandler {
  // arrived: the payload is in memory already, and may stay there: then without a target.
  std::function<Incoming(PeerId from, const Header&, bool arrived)> on_header;
  std::function<void(PeerId from, const Header&, Incoming)> on_payload;
  std::function<bool(PeerId to, OutFrame&)> next_frame;
  std::function<bool(PeerId to)> has_frames;
  std::function<void(PeerId)> on_link_reset;
};

struct PeerInfo {
  PeerId peer = 0;
  std::uint8_t slot = kNoSlot;
  std::vector<std::string> addresses;  // numeric; empty: cannot be dialled
  std::string pair_key = {};           // kTlsKeyBytes, of it and us alone; empty: the run's
};

struct MeshEvent {
  enum class Kind : std::uint8_t {
    link_up,
    link_down,  // no live stream to `peer` any more
    refused,    // `peer` broke the protocol
    stranger,   // a connection with another run, version or destination
    no_descriptors
  } kind;
  PeerId peer = 0;
  std::string detail;
};

struct LinkStats {
  PeerId peer = 0;
  bool up = false;
  bool ours = false;  // dialled by us
  bool is_unix = false;
  bool is_tls = false;
  bool is_shared = false;  // large payloads lie in memory of both
  std::size_t streams = 0;
  std::uint64_t sent_bytes = 0, received_bytes = 0;
  double rtt_s = 0.0;      // 0: not measured yet
  double rate_bps = 0.0;   // sent, while there was something to send
  double pace_bps = 0.0;   // ceiling that we set ourselves; 0: none
  std::string congestion;  // control of the newest stream
  PeerId via = 0;
};

class Mesh {
 public:
  // Throws std::runtime_error naming the address that cannot be bound.
  Mesh(PeerId self, const std::vector<std::string>& listen, MeshOptions options,
       MeshHandler handler);
  ~Mesh();
  Mesh(const Mesh&) = delete;
  Mesh& operator=(const Mesh&) = delete;

  const std::vector<std::string>& addresses() const { return addresses_; }

  // Everybody in the view, self included. Streams to others are closed.
  void set_peers(const std::vector<PeerInfo>& peers, Clock now);
  // While there is no live stream to `peer` its frames travel through `via` (0: they wait).
  void set_route(PeerId peer, PeerId via);
  // Offers paused frames again (after an install).
  void reoffer(Clock now);
  // One turn: waits until something happens or `until`, handles it.
  void run_once(Clock until);
  // Closes every socket, so that the others see at once that we are gone; the last call but the
  // end.
  void shut();
  // Makes a run_once on another thread return soon. The only call that any thread may make.
  void wake();

  std::vector<MeshEvent> take_events();
  std::vector<LinkStats> stats() const;
  // Bytes of payloads and headers over all links there ever were.
  struct Traffic {
    std::uint64_t sent_bytes = 0, received_bytes = 0;
  };
  Traffic traffic() const;
  // What we sent over TCP while there was more to send; 0: not measured yet.
  double uplink_bps() const { return uplink_bps_; }
  // Memory whose bytes go to peers of this host without a copy. Null: there is none to be had, or
  // nobody to read it.
  std::shared_ptr<std::byte[]> lendable(std::size_t bytes);
  std::size_t lent() const;           // payloads that others may read now
  std::uint64_t lent_so_far() const;  // bytes, over the streams that are open
  std::size_t strangers() const { return strangers_.size(); }
  static Clock now();

 private:
  struct Listener {
    Fd fd;
    bool is_unix = false;
  };
  struct Relayed {
    Header header;
    std::shared_ptr<std::vector<std::byte>> payload;
  };
  struct Link {
    PeerId peer = 0;
    std::uint8_t slot = kNoSlot;
    std::vector<Address> addresses;
    std::vector<std::uint64_t> streams;  // ids: open ones
    bool lost_frames = false;            // a stream broke: exchange HAVE on the next one
    PeerId via = 0;
    // dialling
    Clock down_since = 0;
    bool ours = false;  // the newest stream was dialled by us: more of them are ours to open
    Clock may_dial_at = 0;
    double backoff_s = 0.0;
    std::size_t next_address = 0;
    std::size_t dialling = 0;  // streams connecting or greeting
    // relaying: frames for this peer from others
    std::deque<Relayed> relay;
    std::size_t relay_bytes = 0;
    std::size_t relay_reserved = 0;  // being received
    SlotMask relay_sources = 0;      // who has sent through us to this peer
    bool turn = false;               // alternates between own and routed frames
    // how many streams the path needs
    std::size_t target_streams = 1;
    bool fears_loss = true;
    double rtt_s = 0.0;
    Clock judged_at = 0;
    double busy_s = 0.0;
    std::uint64_t busy_bytes = 0;
    Clock busy_since = 0;
    std::uint64_t busy_mark = 0;
    double rate_bps = 0.0, rate_before = 0.0;
    Clock no_growth_until = 0;
    // how fast they may go together
    PathWatch watch;
    double ceiling = 0.0;                              // bytes a second that are set; 0: none
    std::uint64_t sent_bytes = 0, received_bytes = 0;  // of streams now closed
  };
  using Streams = std::unordered_map<std::uint64_t, std::unique_ptr<Stream>>;

  // mesh.cpp: descriptors, accept, handshake
  void listen(const std::string& text);
  void watch(Stream& s);
  void on_ready(std::uint64_t id, std::uint32_t events, Clock now);
  void connected(Stream& s, Clock now);
  void serve(std::uint64_t id, Clock now);
  Stream& add_stream(Fd fd, bool is_unix, Clock now);
  void forget_stranger(std::uint64_t id);
  void frames_lost(Link& link);
  void accept_some(Listener& listener, Clock now);
  void make_room_for_stranger(std::uint64_t origin);
  void read_hello(Stream& s, Clock now);
  void check_hello(Stream& s, Clock now);
  void send_hello(Stream& s, Clock now);
  void opened(Stream& s, Clock now);
  void adopt_waiting(Clock now);
  void close(Stream& s, const std::string& reason, Clock now);
  void reap();
  void emit(MeshEvent::Kind kind, PeerId peer, std::string detail);

  // frames.cpp: reading, writing, relaying
  void read_some(Stream& s, Clock now);
  bool next_header(Stream& s, Clock now);
  void mark_ready(Stream& s);
  void got(Stream& s, std::size_t bytes, Clock now);
  bool offer(Stream& s, Clock now);
  Incoming offer_relayed(Stream& s);
  void finish_frame(Stream& s, Clock now);
  void on_liveness_frame(Stream& s, Clock now);
  Moved fill_payload(Stream& s);
  void write_some(Stream& s, Clock now);
  bool refill(Stream& s);
  void start_bulk(Stream& s, const Link& link);
  static void push_back(Stream& s, Stream::Out out);
  bool next_for(Link& link, OutFrame& frame);
  bool next_routed(Link& link, OutFrame& frame);
  bool anything_for(const Link& link) const;
  void wrote(Stream& s, std::size_t bytes, Clock now);
  void push_control(Stream& s, const Header& header);
  void resume_paused();
  void pump(Clock now);

  // lending.cpp: payloads in memory that both processes have
  void start_sharing(Stream& s);
  void stop_sharing(Stream& s);
  bool lend(Stream& s, OutFrame& frame);
  bool offered(Stream& s, std::uint32_t segment);
  bool on_sharing_frame(Stream& s, Clock now);
  const char* take_memory(Stream& s);
  const char* take_answer(Stream& s);
  const char* take_lend(Stream& s);
  const char* take_returned(Stream& s);
  static bool fits(const Loan& loan, std::size_t bytes);
  void take_loan(Stream& s);
  void return_loans(Stream& s);
  void say_gone(Stream& s, std::uint32_t segment);
  void trim_arena(Clock now);

  // links.cpp: dialling, deadlines, growth
  void maintain(Clock now);
  void maintain_link(Link& link, Clock now);
  void maintain_stream(Stream& s, Clock now);
  bool dials(const Link& link, Clock now) const;
  void dial(Link& link, Clock now);
  void dial_failed(Link& link, Clock now);
  const Address* pick_address(Link& link);
  void suit_path(Link& link, Stream& s);
  void judge_rate(Link& link, Clock now);
  void note_busy(Link& link, Clock now);
  bool is_paced(const Link& link) const;
  std::size_t add_progress(const Link& link, PathProgress& sum);
  void pace(Link& link, Clock now);
  void pace_uplink(Clock now);
  void share_out();
  void note_uplink(Clock now);
  void tell_sources(Link& link);
  void due(Clock at) { due_ = at < due_ ? at : due_; }

  Link* link_of(PeerId peer);
  const Link* link_of(PeerId peer) const;
  PeerId peer_of(std::uint8_t slot) const;
  Stream* stream(std::uint64_t id);
  bool has_live(PeerId peer) const;

  const PeerId self_;
  MeshOptions options_;
  MeshHandler handler_;
  std::unique_ptr<TlsContext> tls_;  // outlives the streams
  std::unique_ptr<Arena> arena_;     // null: nothing is shared
  std::size_t lending_ = 0;          // streams whose other end takes memory
  Fd epoll_, wake_, spare_;
  std::vector<Listener> listeners_;
  std::vector<std::string> addresses_;
  std::uint64_t next_id_ = 0;
  Streams streams_;
  std::vector<std::uint64_t> dead_;
  std::deque<std::uint64_t> strangers_;  // oldest first
  std::map<PeerId, Link> links_;
  Traffic gone_;  // of links that are no more
  std::uint8_t own_slot_ = kNoSlot;
  bool can_be_dialled_ = false;
  std::array<PeerId, kMaxPeers> slots_{};
  std::vector<std::uint64_t> ready_;  // streams with work left
  Clock due_ = 0;
  Clock maintained_at_ = 0;
  std::uint64_t tcp_sent_bytes_ = 0;
  // the same as for a link, over all of them
  double uplink_busy_s_ = 0.0;
  std::uint64_t uplink_bytes_ = 0, uplink_mark_ = 0;
  Clock uplink_since_ = 0;
  double uplink_bps_ = 0.0;
  PathWatch uplink_watch_;
  bool bulk_fears_nothing_ = false;  // the control we choose for long paths is BBR, and to be had
  std::vector<MeshEvent> events_;
  std::vector<std::byte> discard_;
  std::mt19937_64 jitter_;
};

}  // namespace decotrain::net
