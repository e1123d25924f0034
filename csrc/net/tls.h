// Tls: TLS 1.3 with a pre-shared key over one non-blocking socket (docs/security.md).
//
// One cipher, one group, no certificates, no tickets, no early data: nothing to negotiate. Both
// sides prove the key and agree on a fresh secret (psk_dhe_ke). The identity that the key is asked
// for by names run, peers and stream, and is bound to the handshake. Whoever does not know the key
// gets no byte back. It does not know frames, and decides no deadline.
#pragma once

#include <openssl/ssl.h>
#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "types.h"

namespace decotrain::net {

struct Moved;

constexpr std::size_t kTlsKeyBytes = 32;
constexpr std::size_t kHandshakeBytesMax = 4096;  // taken from a stranger; ours need about 500

// Who dials whom, for which stream. Travels in clear.
struct TlsName {
  std::uint64_t run = 0;
  PeerId from = 0;
  PeerId to = 0;
  std::uint64_t stream = 0;

  static constexpr std::size_t kBytes = 40;
  std::array<unsigned char, kBytes> bytes() const;
  static std::optional<TlsName> parse(std::span<const unsigned char> bytes);
};

// What all connections of one mesh have in common.
class TlsContext {
 public:
  // `key`: of everybody whose pair has no key of its own; empty: only pairs with a key may talk.
  // Throws std::runtime_error when OpenSSL cannot do what is asked, std::invalid_argument for a
  // key of another size. `records_per_key`: then the sender takes its next key.
  TlsContext(std::string key, std::uint64_t run, PeerId self,
             std::uint64_t records_per_key = std::uint64_t{1} << 23);
  ~TlsContext();
  TlsContext(const TlsContext&) = delete;
  TlsContext& operator=(const TlsContext&) = delete;

  // Of the pairs that we are one end of; all of them: a pair that is not named loses its key.
  // Connections that are open stay as they are. A key has kTlsKeyBytes.
  void set_keys(std::map<PeerId, std::string> keys);

 private:
  friend class Tls;
  const std::string* key_for(PeerId far) const;  // null: there is none

  std::string key_;
  std::map<PeerId, std::string> keys_;
  std::uint64_t run_;
  PeerId self_;
  std::uint64_t records_per_key_;
  SSL_CTX* context_ = nullptr;
};

class Tls {
 public:
  // The context outlives the connection; the socket belongs to the caller and is open meanwhile.
  static std::unique_ptr<Tls> dial(const TlsContext& context, int fd, PeerId to,
                                   std::uint64_t stream);
  static std::unique_ptr<Tls> accept(const TlsContext& context, int fd);
  ~Tls();
  Tls(const Tls&) = delete;
  Tls& operator=(const Tls&) = delete;

  // Both go on with the handshake first, and are blocked until it is done. A call that moved fewer
  // bytes than it was offered would be blocked if repeated at once.
  Moved read(iovec* parts, int count);
  Moved write(iovec* parts, int count);
  // Hands the kernel what is encrypted and not sent yet. Blocked: it has no room.
  Moved flush();
  std::size_t unsent_bytes() const { return sealed_.size() - sent_; }
  bool ready() const { return ready_; }
  // Is this the connection that the two agreed on a key for?
  bool vouches_for(PeerId far, std::uint64_t stream) const;

 private:
  Tls(const TlsContext& context, int fd, bool dials);
  SSL_SESSION* session() const;
  bool handshake();
  bool seal(const void* from, std::size_t size);
  Moved stopped(int result, std::size_t bytes);
  Moved broken(int error);

  static int use_session(SSL* ssl, const EVP_MD* digest, const unsigned char** identity,
                         std::size_t* size, SSL_SESSION** session);
  static int find_session(SSL* ssl, const unsigned char* identity, std::size_t size,
                          SSL_SESSION** session);
  static BIO_METHOD* methods();
  static int bio_read(BIO* bio, char* to, int size);
  static int bio_write(BIO* bio, const char* from, int size);
  static long bio_control(BIO* bio, int command, long number, void* pointer);
  friend class TlsContext;

  const TlsContext& context_;
  const int fd_;
  const bool dials_;
  SSL* ssl_ = nullptr;
  bool ready_ = false;
  int error_ = 0;         // errno of what ended it; every later call fails
  int socket_error_ = 0;  // errno of the last read, or of the end
  TlsName name_;  // who dials: at once; who accepts: when the other has shown that it knows the key
  std::array<unsigned char, TlsName::kBytes> identity_{};
  std::size_t received_ = 0;  // before the handshake is done
  std::uint64_t records_ = 0;
  std::vector<char> sealed_;  // for the kernel
  std::size_t sent_ = 0;      // of it
};

}  // namespace decotrain::net
