#include "net/tls.h"

#include <openssl/crypto.h>
#include <openssl/err.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "net/channel.h"

namespace decotrain::net {
namespace {

constexpr std::uint64_t kMagic = 0x312d736c742d7464;  // "dt-tls-1"
constexpr std::size_t kRecordBytes = 16 << 10;        // of TLS
constexpr std::size_t kReadBytes = 64 << 10;          // one system call fills it
constexpr std::size_t kSealBytes = 128 << 10;         // encrypted before the kernel gets it
constexpr std::size_t kSmallBytes = 4 << 10;          // pieces up to this share a record
constexpr std::array<unsigned char, 2> kCipher{0x13, 0x01};

void require(bool done, const char* what) {
  if (!done) throw std::runtime_error(std::string("cannot set up TLS: ") + what);
}

}  // namespace

std::array<unsigned char, TlsName::kBytes> TlsName::bytes() const {
  std::array<unsigned char, kBytes> out{};
  const std::array<std::uint64_t, 5> words{kMagic, run, from, to, stream};
  static_assert(sizeof words == kBytes);
  std::memcpy(out.data(), words.data(), kBytes);
  return out;
}

std::optional<TlsName> TlsName::parse(std::span<const unsigned char> bytes) {
  std::array<std::uint64_t, 5> words{};
  if (bytes.size() != kBytes) return std::nullopt;
  std::memcpy(words.data(), bytes.data(), kBytes);
  if (words[0] != kMagic) return std::nullopt;
  return TlsName{words[1], words[2], words[3], words[4]};
}

// ---- the context

TlsContext::TlsContext(std::string key, std::uint64_t run, PeerId self,
                       std::uint64_t records_per_key)
    : key_(std::move(key)), run_(run), self_(self), records_per_key_(records_per_key) {
  if (!key_.empty() && key_.size() != kTlsKeyBytes) {
    throw std::invalid_argument("a TLS key of another size");
  }
  context_ = SSL_CTX_new(TLS_method());
  require(context_ != nullptr, "no context");
  SSL_CTX_set_options(context_, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  SSL_CTX_set_session_cache_mode(context_, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_read_ahead(context_, 1);
  SSL_CTX_set_default_read_buffer_len(context_, kReadBytes);
  SSL_CTX_set_psk_use_session_callback(context_, &Tls::use_session);
  SSL_CTX_set_psk_find_session_callback(context_, &Tls::find_session);
  const bool fits = SSL_CTX_set_min_proto_version(context_, TLS1_3_VERSION) == 1 &&
                    SSL_CTX_set_max_proto_version(context_, TLS1_3_VERSION) == 1 &&
                    SSL_CTX_set_ciphersuites(context_, "TLS_AES_128_GCM_SHA256") == 1 &&
                    SSL_CTX_set1_groups_list(context_, "X25519") == 1 &&
                    SSL_CTX_set_num_tickets(context_, 0) == 1 &&
                    SSL_CTX_set_max_early_data(context_, 0) == 1 &&
                    SSL_CTX_set_recv_max_early_data(context_, 0) == 1;
  if (!fits) SSL_CTX_free(std::exchange(context_, nullptr));
  require(fits, "this OpenSSL lacks TLS 1.3 with AES-128-GCM and X25519");
}

TlsContext::~TlsContext() {
  OPENSSL_cleanse(key_.data(), key_.size());
  set_keys({});
  SSL_CTX_free(context_);
}

void TlsContext::set_keys(std::map<PeerId, std::string> keys) {
  for (auto& [peer, key] : keys_) OPENSSL_cleanse(key.data(), key.size());
  keys_ = std::move(keys);
  std::erase_if(keys_, [](const auto& entry) { return entry.second.size() != kTlsKeyBytes; });
}

const std::string* TlsContext::key_for(PeerId far) const {
  const auto it = keys_.find(far);
  if (it != keys_.end()) return &it->second;
  return key_.empty() ? nullptr : &key_;
}

// ---- one connection

Tls::Tls(const TlsContext& context, int fd, bool dials)
    : context_(context), fd_(fd), dials_(dials), ssl_(SSL_new(context.context_)) {
  BIO* bio = BIO_new(methods());
  if (ssl_ == nullptr || bio == nullptr) {
    BIO_free(bio);
    SSL_free(ssl_);
    throw std::bad_alloc();
  }
  BIO_set_data(bio, this);
  BIO_set_init(bio, 1);
  SSL_set_bio(ssl_, bio, bio);
  SSL_set_app_data(ssl_, this);
  if (dials) {
    SSL_set_verify(ssl_, SSL_VERIFY_PEER, nullptr);  // a certificate is nobody we know
    SSL_set_connect_state(ssl_);
  } else {
    SSL_set_accept_state(ssl_);
  }
}

Tls::~Tls() { SSL_free(ssl_); }

std::unique_ptr<Tls> Tls::dial(const TlsContext& context, int fd, PeerId to, std::uint64_t stream) {
  std::unique_ptr<Tls> tls(new Tls(context, fd, true));
  tls->name_ = {context.run_, context.self_, to, stream};
  tls->identity_ = tls->name_.bytes();
  return tls;
}

std::unique_ptr<Tls> Tls::accept(const TlsContext& context, int fd) {
  return std::unique_ptr<Tls>(new Tls(context, fd, false));
}

bool Tls::vouches_for(PeerId far, std::uint64_t stream) const {
  return ready_ && (dials_ ? name_.to : name_.from) == far && name_.stream == stream;
}

// The key in the shape that OpenSSL wants: the session of a handshake that never was.
SSL_SESSION* Tls::session() const {
  const std::string* known = context_.key_for(dials_ ? name_.to : name_.from);
  if (known == nullptr) return nullptr;
  SSL_SESSION* made = SSL_SESSION_new();
  const SSL_CIPHER* cipher = SSL_CIPHER_find(ssl_, kCipher.data());
  const auto* key = reinterpret_cast<const unsigned char*>(known->data());
  if (made != nullptr && cipher != nullptr && SSL_SESSION_set_cipher(made, cipher) == 1 &&
      SSL_SESSION_set_protocol_version(made, TLS1_3_VERSION) == 1 &&
      SSL_SESSION_set1_master_key(made, key, known->size()) == 1) {
    return made;
  }
  SSL_SESSION_free(made);
  return nullptr;
}

int Tls::use_session(SSL* ssl, const EVP_MD*, const unsigned char** identity, std::size_t* size,
                     SSL_SESSION** session) {
  const auto* self = static_cast<const Tls*>(SSL_get_app_data(ssl));
  *session = self->session();
  *identity = self->identity_.data();
  *size = self->identity_.size();
  return *session != nullptr ? 1 : 0;
}

// Only a name that is meant for us: a handshake that comes back to its sender, or went to another
// peer before, ends here.
int Tls::find_session(SSL* ssl, const unsigned char* identity, std::size_t size,
                      SSL_SESSION** session) {
  auto* self = static_cast<Tls*>(SSL_get_app_data(ssl));
  const auto name = TlsName::parse({identity, size});
  *session = nullptr;
  if (!name || name->run != self->context_.run_ || name->to != self->context_.self_ ||
      name->from == self->context_.self_) {
    return 0;
  }
  self->name_ = *name;
  *session = self->session();
  return *session != nullptr ? 1 : 0;
}

bool Tls::handshake() {
  if (ready_) return true;
  const int result = SSL_do_handshake(ssl_);
  if (result != 1) {
    const bool known = dials_ || name_.from != 0;
    if (!stopped(result, 0).blocked) return false;
    if (known) {
      (void)flush();
    } else if (unsent_bytes() != 0) {
      broken(EKEYREJECTED);  // OpenSSL has a word for whoever does not know the key; we have none
    }
    return false;
  }
  if (SSL_session_reused(ssl_) != 1) {  // of a key, that is; never by a certificate
    broken(EKEYREJECTED);
    return false;
  }
  ready_ = true;
  return true;
}

// Says of OpenSSL's result what a read or write would.
Moved Tls::stopped(int result, std::size_t bytes) {
  const int why = SSL_get_error(ssl_, result);
  ERR_clear_error();
  if (why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE) {
    Moved moved;
    moved.bytes = bytes;
    moved.blocked = bytes == 0;
    return moved;
  }
  Moved moved = broken(!ready_ ? EKEYREJECTED : socket_error_ != 0 ? socket_error_ : EPROTO);
  if (bytes != 0) {
    moved = {};
    moved.bytes = bytes;
  }
  return moved;
}

// No alert is sent: a stranger gets no byte. The poller hears of the end, so that whoever was
// given bytes by the call that failed comes back for the failure.
Moved Tls::broken(int error) {
  error_ = error;
  sealed_.clear();
  sent_ = 0;
  ::shutdown(fd_, SHUT_RDWR);
  Moved moved;
  moved.failed = true;
  moved.error = error;
  return moved;
}

Moved Tls::read(iovec* parts, int count) {
  Moved moved;
  ERR_clear_error();
  if (error_ == 0 && !handshake() && error_ == 0) {
    moved.blocked = true;
    return moved;
  }
  for (int i = 0; i < count && error_ == 0; ++i) {
    auto* to = static_cast<std::byte*>(parts[i].iov_base);
    for (std::size_t got = 0; got < parts[i].iov_len;) {
      std::size_t n = 0;
      const int result = SSL_read_ex(ssl_, to + got, parts[i].iov_len - got, &n);
      if (result != 1) {
        moved = stopped(result, moved.bytes);
        // What we owe: the end of the handshake, the answer to a change of keys.
        if (!moved.failed && error_ == 0) (void)flush();
        return moved;
      }
      got += n;
      moved.bytes += n;
    }
  }
  if (error_ != 0 && moved.bytes == 0) {
    moved.failed = true;
    moved.error = error_;
  } else if (unsent_bytes() != 0) {
    (void)flush();
  }
  return moved;
}

bool Tls::seal(const void* from, std::size_t size) {
  if (size == 0) return true;
  records_ += (size + kRecordBytes - 1) / kRecordBytes;
  std::size_t n = 0;
  if (records_ >= context_.records_per_key_) {
    records_ = 0;
    if (SSL_key_update(ssl_, SSL_KEY_UPDATE_NOT_REQUESTED) != 1) return false;
  }
  return SSL_write_ex(ssl_, from, size, &n) == 1 && n == size;
}

Moved Tls::write(iovec* parts, int count) {
  Moved moved;
  ERR_clear_error();
  if (error_ == 0) moved = flush();
  if (error_ == 0 && (moved.blocked || !handshake())) moved.blocked = error_ == 0;
  if (error_ != 0) return broken(error_);
  if (moved.blocked) return moved;
  std::array<std::byte, kRecordBytes> small;
  std::size_t small_bytes = 0;
  int i = 0;
  std::size_t skip = 0;
  while (i < count && unsent_bytes() == 0) {
    bool done = true;
    for (; done && i < count && sealed_.size() < kSealBytes; ++i, skip = 0) {
      const auto* from = static_cast<const std::byte*>(parts[i].iov_base) + skip;
      const std::size_t left = parts[i].iov_len - skip;
      if (left <= kSmallBytes && small_bytes + left <= small.size()) {
        std::memcpy(small.data() + small_bytes, from, left);
        small_bytes += left;
        moved.bytes += left;
        continue;
      }
      done = seal(small.data(), std::exchange(small_bytes, 0));
      const std::size_t n = std::min(left, kSealBytes);
      done = done && seal(from, n);
      moved.bytes += n;
      skip += n;
      if (n < left) break;
    }
    done = done && seal(small.data(), std::exchange(small_bytes, 0));
    if (!done) return stopped(-1, 0);
    if (flush().failed) return broken(error_);
  }
  return moved;
}

Moved Tls::flush() {
  Moved moved;
  while (sent_ < sealed_.size()) {
    const ssize_t n =
        ::send(fd_, sealed_.data() + sent_, sealed_.size() - sent_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      sent_ += static_cast<std::size_t>(n);
    } else if (n < 0 && errno == EINTR) {
      continue;
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      moved.blocked = true;
      return moved;
    } else {
      return broken(n < 0 ? errno : EPIPE);
    }
  }
  sealed_.clear();
  sent_ = 0;
  return moved;
}

// ---- the socket, as OpenSSL sees it

BIO_METHOD* Tls::methods() {
  static BIO_METHOD* const made = [] {
    BIO_METHOD* method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "decotrain");
    require(method != nullptr && BIO_meth_set_read(method, &Tls::bio_read) == 1 &&
                BIO_meth_set_write(method, &Tls::bio_write) == 1 &&
                BIO_meth_set_ctrl(method, &Tls::bio_control) == 1,
            "no BIO");
    return method;
  }();
  return made;
}

int Tls::bio_read(BIO* bio, char* to, int size) {
  auto* self = static_cast<Tls*>(BIO_get_data(bio));
  BIO_clear_retry_flags(bio);
  auto wanted = static_cast<std::size_t>(size);
  if (!self->ready_) {
    wanted = std::min(wanted, kHandshakeBytesMax - self->received_);
    if (wanted == 0) return -1;  // too much talk for a stranger
  }
  ssize_t n = 0;
  do {
    n = ::recv(self->fd_, to, wanted, MSG_DONTWAIT);
  } while (n < 0 && errno == EINTR);
  if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
    BIO_set_retry_read(bio);
  } else if (n <= 0) {
    self->socket_error_ = n < 0 ? errno : ECONNRESET;
  }
  if (n > 0 && !self->ready_) self->received_ += static_cast<std::size_t>(n);
  return static_cast<int>(n);
}

int Tls::bio_write(BIO* bio, const char* from, int size) {
  auto* self = static_cast<Tls*>(BIO_get_data(bio));
  BIO_clear_retry_flags(bio);
  self->sealed_.insert(self->sealed_.end(), from, from + size);
  return size;
}

long Tls::bio_control(BIO*, int command, long, void*) { return command == BIO_CTRL_FLUSH ? 1 : 0; }

}  // namespace decotrain::net
