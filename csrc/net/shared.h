// Memory shared by processes of one host: what we lend to others (Arena), what others lend to us
// (Mapping, Loan), and the numbers of loans to give back (Returns). It knows neither sockets nor
// frames: lending.cpp does.
//
// A lender writes, a borrower only reads: segments are sealed so that their size stays and that
// nobody but their maker maps them writable. What a borrower reads is nevertheless the lender's to
// change: sizes and places never come from shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "net/channel.h"

namespace decotrain::net {

constexpr std::size_t kSegmentBytesMax = std::size_t{72} << 20;  // the largest chunk fits
constexpr std::size_t kSegmentBytes = std::size_t{16} << 20;     // of several blocks, at most
constexpr std::size_t kBlocksPerSegment = 32;
constexpr std::size_t kSegmentsMax = 512;  // of one lender
constexpr std::size_t kRetiredMax = 128;   // lost with broken links before we make no more,
constexpr double kForgive_s = 60.0;        // and after so long half of them count no more
constexpr double kSegmentIdle_s = 10.0;

// What we lend. Blocks of one size come from the same segments; a block goes back with its last
// owner, here or at a borrower. Thread-safe.
class Arena {
 public:
  explicit Arena(std::size_t max_bytes);
  // 64-byte aligned. Null: no room, or the system gives no such memory.
  std::shared_ptr<std::byte[]> allocate(std::size_t bytes);
  struct Where {
    std::uint32_t segment = 0;
    std::size_t offset = 0;
  };
  // Where these bytes lie, if they are the arena's.
  std::optional<Where> find(const std::byte* at, std::size_t bytes) const;
  struct File {
    int fd = -1;
    std::size_t bytes = 0;
    std::shared_ptr<const void> keep;  // keeps fd open
  };
  File file(std::uint32_t segment) const;
  // Nobody can say any more who reads it: no block of it is given out again.
  void retire(std::uint32_t segment);
  // Gives up segments that are retired and free, or have been free for long; which ones.
  std::vector<std::uint32_t> trim(double now);
  std::size_t bytes() const;

 private:
  struct Segment;
  struct State;
  std::shared_ptr<std::byte[]> take(const std::shared_ptr<Segment>& segment);
  std::shared_ptr<State> state_;  // outlives us with the last block
};

// A segment of another process, read-only.
class Mapping {
 public:
  // Null when it is not what a lender makes: sealed, of this size, all of it there.
  static std::shared_ptr<const Mapping> of(const Fd& fd, std::uint64_t bytes);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  const std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  Mapping(const std::byte* data, std::size_t bytes) : data_(data), bytes_(bytes) {}
  const std::byte* data_;
  std::size_t bytes_;
};

// Numbers of loans that nobody here reads any more. Any thread adds, the Mesh's takes.
class Returns {
 public:
  explicit Returns(int wake_fd) : wake_fd_(wake_fd) {}
  void add(std::uint64_t loan);
  std::vector<std::uint64_t> take();
  void close();  // the stream is gone: nobody waits for them

 private:
  std::mutex mutex_;
  std::vector<std::uint64_t> loans_;
  int wake_fd_;  // -1: closed
};

// Bytes lent to us; they are given back with the last owner.
struct Loan {
  std::shared_ptr<const Mapping> mapping;
  std::shared_ptr<Returns> returns;
  std::size_t offset = 0;
  std::uint64_t number = 0;

  Loan(std::shared_ptr<const Mapping> of, std::shared_ptr<Returns> to, std::size_t at,
       std::uint64_t n)
      : mapping(std::move(of)), returns(std::move(to)), offset(at), number(n) {}
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;
  ~Loan() { returns->add(number); }
};

// What one stream has lent and borrowed; it ends with the stream.
struct Sharing {
  explicit Sharing(int wake_fd) : returns(std::make_shared<Returns>(wake_fd)) {}
  ~Sharing() { returns->close(); }
  Sharing(const Sharing&) = delete;
  Sharing& operator=(const Sharing&) = delete;

  // as lender
  struct Lent {
    std::uint32_t segment = 0;
    std::shared_ptr<const void> keep;
  };
  bool lends = false;                      // the other side takes memory, and has refused none
  std::map<std::uint32_t, bool> segments;  // offered; true: taken
  std::optional<std::uint32_t> asked;      // the one offer that is not answered yet
  std::unordered_map<std::uint64_t, Lent> lent;
  std::uint64_t next_loan = 0;
  std::uint64_t lent_bytes = 0;  // so far

  // as borrower
  std::map<std::uint32_t, std::shared_ptr<const Mapping>> mappings;
  std::size_t mapped_bytes = 0;
  std::shared_ptr<Returns> returns;
  std::shared_ptr<Loan> announced;  // where the next frame's payload lies
  std::uint64_t borrowed_bytes = 0;
};

}  // namespace decotrain::net
