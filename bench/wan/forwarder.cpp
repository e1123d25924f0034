// The lab's internet: carries packets between the TUN devices of sites, with what links do to them.
//
//   forwarder run SEED OFFLOAD NAME=NSFD@ADDRESS...   one TUN device `wan0` in each namespace
//   forwarder enter NSFD PROGRAM ARGUMENT...          PROGRAM inside the namespace
//
// `run` takes commands from stdin, one on a line, and answers each with one line on stdout:
//
//   set A B delay_ms= jitter_ms= loss= reorder= reorder_ms= rate_mbps= queue_bytes= up|down
//       the directed path; A or B may be *
//   access A up_mbps= up_queue_bytes= down_mbps= down_queue_bytes=
//       what a site shares among all its paths
//   after SECONDS set ...        the same later
//   stats                        counters, as JSON
//
// A packet waits in the sender's queue, leaves at the sender's rate, meets the path (loss, its own
// rate, delay), then the receiver's queue and rate. Loss, queue limits and reordering work on
// segments, also when the kernel hands over many at once (packet.h). One thread. When stdin ends,
// every process that is still inside one of the namespaces is killed: that is how the lab leaves
// nothing behind however it ends. It sets up no addresses and knows no profiles: lab.py does.
#include <dirent.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>

#include "control.h"

namespace lab {
namespace {

constexpr std::size_t kMaxSites = 64;
int open_tun(int namespace_fd, bool offload) {
  if (setns(namespace_fd, CLONE_NEWNET) != 0) fail("entering a namespace");
  const int tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  if (tun < 0) fail("/dev/net/tun");
  ifreq request{};
  request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
  std::strcpy(request.ifr_name, "wan0");
  if (ioctl(tun, TUNSETIFF, &request) != 0) fail("TUNSETIFF");
  if (ioctl(tun, TUNSETOFFLOAD, offload ? TUN_F_CSUM | TUN_F_TSO4 : 0) != 0) fail("TUNSETOFFLOAD");
  return tun;
}

Site open_site(const std::string& text, bool offload) {
  Site site;
  const std::size_t equals = text.find('=');
  const std::size_t at = text.find('@');
  if (equals == std::string::npos || at == std::string::npos || at < equals) {
    throw std::runtime_error("not NAME=NSFD@ADDRESS: " + text);
  }
  site.name = text.substr(0, equals);
  const int fd = std::stoi(text.substr(equals + 1, at - equals - 1));
  in_addr address{};
  if (inet_pton(AF_INET, text.substr(at + 1).c_str(), &address) != 1) {
    throw std::runtime_error("not an address: " + text);
  }
  site.address = ntohl(address.s_addr);
  struct stat info{};
  if (fstat(fd, &info) != 0) fail("a namespace's descriptor");
  site.inode = info.st_ino;
  site.tun = open_tun(fd, offload);
  return site;
}

// Every process inside one of the given namespaces: they are the lab's, so all in them is too.
void kill_inside(const std::vector<ino_t>& namespaces) {
  DIR* proc = opendir("/proc");
  if (proc == nullptr) return;
  while (const dirent* entry = readdir(proc)) {
    const int pid = std::atoi(entry->d_name);
    if (pid <= 1 || pid == getpid()) continue;
    struct stat info{};
    const std::string path = std::string("/proc/") + entry->d_name + "/ns/net";
    if (stat(path.c_str(), &info) != 0) continue;
    if (std::find(namespaces.begin(), namespaces.end(), info.st_ino) != namespaces.end()) {
      kill(pid, SIGKILL);
    }
  }
  closedir(proc);
}

void loop(Router& router) {
  Control control(router);
  std::vector<pollfd> fds;
  for (const Site& site : router.sites()) fds.push_back({site.tun, POLLIN, 0});
  fds.push_back({STDIN_FILENO, POLLIN, 0});
  std::string input;
  for (;;) {
    const Time now = now_ns();
    Time wait = 1000 * kMillisecond;
    for (const Time due : {router.next_due(), control.next_due()}) {
      if (due >= 0) wait = std::min(wait, std::max<Time>(0, due - now));
    }
    const timespec timeout{wait / 1'000'000'000, wait % 1'000'000'000};
    if (ppoll(fds.data(), fds.size(), &timeout, nullptr) < 0 && errno != EINTR) fail("ppoll");
    control.run_due(now_ns());
    router.run_due(now_ns());
    for (std::size_t i = 0; i + 1 < fds.size(); ++i) {
      if (fds[i].revents != 0) router.read(i);
      router.run_due(now_ns());
    }
    if (fds.back().revents == 0) continue;
    char bytes[4096];
    const ssize_t got = ::read(STDIN_FILENO, bytes, sizeof bytes);
    if (got <= 0) return;
    input.append(bytes, static_cast<std::size_t>(got));
    for (std::size_t end; (end = input.find('\n')) != std::string::npos;) {
      const std::string answer = control.execute(input.substr(0, end), now_ns()) + "\n";
      input.erase(0, end + 1);
      if (write(STDOUT_FILENO, answer.data(), answer.size()) < 0) return;
    }
  }
}

int run(int count, char** arguments) {
  const std::uint64_t seed = std::stoull(arguments[0]);
  const bool offload = std::string(arguments[1]) == "1";
  if (count - 2 > static_cast<int>(kMaxSites)) throw std::runtime_error("too many sites");
  signal(SIGPIPE, SIG_IGN);
  prctl(PR_SET_TIMERSLACK, 1);
  // Its punctuality is the lab's: a real-time priority, or what the rights allow.
  const sched_param priority{1};
  if (sched_setscheduler(0, SCHED_RR, &priority) != 0) setpriority(PRIO_PROCESS, 0, -15);
  const int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
  std::vector<Site> sites;
  for (int i = 2; i < count; ++i) sites.push_back(open_site(arguments[i], offload));
  if (home < 0 || setns(home, CLONE_NEWNET) != 0) fail("returning to the own namespace");
  std::vector<ino_t> namespaces;
  for (const Site& site : sites) namespaces.push_back(site.inode);
  Router router(seed, std::move(sites));
  if (write(STDOUT_FILENO, "ready\n", 6) != 6) return 1;
  loop(router);
  kill_inside(namespaces);
  return 0;
}

int enter(int count, char** arguments) {
  const int fd = std::stoi(arguments[0]);
  if (count < 2 || setns(fd, CLONE_NEWNET) != 0) fail("entering a namespace");
  close(fd);
  execvp(arguments[1], arguments + 1);
  fail(arguments[1]);
}

}  // namespace
}  // namespace lab

int main(int count, char** arguments) {
  try {
    const std::string what = count > 2 ? arguments[1] : "";
    if (what == "run" && count > 4) return lab::run(count - 2, arguments + 2);
    if (what == "enter") return lab::enter(count - 2, arguments + 2);
    throw std::runtime_error("usage: see the head of forwarder.cpp");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "forwarder: %s\n", error.what());
    return 1;
  }
}
