// Commands to the forwarder: checked word by word; what is wrong is answered, nothing is half done.
#pragma once

#include <iterator>
#include <map>

#include "router.h"

namespace lab {

class Control {
 public:
  explicit Control(Router& router) : router_(router) {}

  Time next_due() const { return later_.empty() ? -1 : later_.begin()->first; }

  void run_due(Time now) {
    while (!later_.empty() && later_.begin()->first <= now) {
      execute(later_.begin()->second, now);
      later_.erase(later_.begin());
    }
  }

  std::string execute(const std::string& line, Time now) {
    try {
      std::istringstream in(line);
      std::vector<std::string> words{std::istream_iterator<std::string>(in), {}};
      if (words.empty()) throw std::runtime_error("empty command");
      if (words[0] == "stats") return router_.stats();
      if (words[0] == "set") return set(words, now);
      if (words[0] == "access") return access(words, now);
      if (words[0] != "after" || words.size() < 3) {
        throw std::runtime_error("unknown command " + words[0]);
      }
      const double delay_s = number(words[1]);
      const std::size_t rest = line.find(words[1]) + words[1].size();
      later_.emplace(now + static_cast<Time>(delay_s * 1e9), line.substr(rest));
      return "ok";
    } catch (const std::exception& error) {
      return std::string("error ") + error.what();
    }
  }

 private:
  static double number(const std::string& text) {
    std::size_t used = 0;
    double value = -1;
    try {
      value = std::stod(text, &used);
    } catch (const std::exception&) {
      used = 0;
    }
    if (used != text.size() || !(value >= 0) || value > 1e12) {
      throw std::runtime_error("not a number that makes sense: " + text);
    }
    return value;
  }

  static std::map<std::string, double> settings(const std::vector<std::string>& words,
                                                std::size_t first,
                                                const std::vector<std::string>& known) {
    std::map<std::string, double> found;
    for (std::size_t i = first; i < words.size(); ++i) {
      const std::size_t equals = words[i].find('=');
      const std::string name = words[i].substr(0, equals);
      if (std::find(known.begin(), known.end(), name) == known.end()) {
        throw std::runtime_error("unknown setting " + name);
      }
      const bool flag = name == "up" || name == "down";
      if (flag != (equals == std::string::npos)) throw std::runtime_error("bad " + words[i]);
      found[name] = flag ? 1 : number(words[i].substr(equals + 1));
    }
    return found;
  }

  std::vector<std::size_t> matching(const std::string& name) {
    std::vector<std::size_t> found;
    for (std::size_t i = 0; i < router_.sites().size(); ++i) {
      if (name == "*" || router_.sites()[i].name == name) found.push_back(i);
    }
    if (found.empty()) throw std::runtime_error("no site " + name);
    return found;
  }

  std::string set(const std::vector<std::string>& words, Time now) {
    if (words.size() < 4) throw std::runtime_error("set needs two sites and a setting");
    const auto values = settings(words, 3,
                                 {"delay_ms", "jitter_ms", "loss", "reorder", "reorder_ms",
                                  "rate_mbps", "queue_bytes", "up", "down"});
    for (const char* name : {"loss", "reorder"}) {
      if (values.contains(name) && values.at(name) > 1) throw std::runtime_error("a share above 1");
    }
    for (const std::size_t from : matching(words[1])) {
      for (const std::size_t to : matching(words[2])) {
        if (from != to) apply(router_.path(from, to), values, now);
      }
    }
    return "ok";
  }

  static void apply(Path& path, const std::map<std::string, double>& values, Time now) {
    for (const auto& [name, value] : values) {
      if (name == "delay_ms") path.delay = static_cast<Time>(value * kMillisecond);
      if (name == "jitter_ms") path.jitter = static_cast<Time>(value * kMillisecond);
      if (name == "reorder_ms") path.reorder_hold = static_cast<Time>(value * kMillisecond);
      if (name == "loss") path.loss.set(value, path.random);
      if (name == "reorder") path.reorder.set(value, path.random);
      if (name == "rate_mbps") path.queue.set_rate(value, now);
      if (name == "queue_bytes") path.queue.limit_bytes = value;
      if (name == "up") path.down = false;
      if (name == "down") path.down = true;
    }
  }

  std::string access(const std::vector<std::string>& words, Time now) {
    if (words.size() < 3) throw std::runtime_error("access needs a site and a setting");
    const auto values =
        settings(words, 2, {"up_mbps", "up_queue_bytes", "down_mbps", "down_queue_bytes"});
    for (const std::size_t i : matching(words[1])) {
      Site& site = router_.sites()[i];
      for (const auto& [name, value] : values) {
        if (name == "up_mbps") site.up.set_rate(value, now);
        if (name == "down_mbps") site.down.set_rate(value, now);
        if (name == "up_queue_bytes") site.up.limit_bytes = value;
        if (name == "down_queue_bytes") site.down.limit_bytes = value;
      }
    }
    return "ok";
  }

  Router& router_;
  std::multimap<Time, std::string> later_;
};

}  // namespace lab
