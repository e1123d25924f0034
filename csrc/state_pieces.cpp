// How a fragment's arrays are cut into pieces.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "state.h"

namespace decotrain {

StatePieces::StatePieces(const std::vector<StateArray>& arrays) {
  std::vector<StateArray> single;
  std::vector<std::vector<StateArray>> groups;  // of as many elements, in order of appearance
  for (const StateArray& array : arrays) {
    if (array.bytes.empty()) continue;
    if (array.elements == 0 || array.bytes.size() % array.elements != 0) {
      throw std::invalid_argument(std::to_string(array.bytes.size()) + " bytes are not " +
                                  std::to_string(array.elements) + " elements");
    }
    bytes_ += array.bytes.size();
    if (array.elements == 1) {
      single.push_back(array);
      continue;
    }
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const auto& group) {
      return group.front().elements == array.elements;
    });
    if (same != groups.end()) {
      same->push_back(array);
    } else {
      groups.push_back({array});
    }
  }
  for (const StateArray& array : single) add({array});
  heads_ = pieces_.size();
  room_ = 0;
  for (const auto& group : groups) add(group);
}

void StatePieces::add(const std::vector<StateArray>& group) {
  const std::size_t elements = group.front().elements;
  std::size_t width = 0;  // bytes of one index
  for (const StateArray& array : group) width += array.bytes.size() / elements;
  if (width == 0) return;  // arrays of no bytes
  if (width > kStateChunkBytes) {
    throw std::invalid_argument("one index of the arrays with " + std::to_string(elements) +
                                " elements has " + std::to_string(width) + " bytes");
  }
  for (std::size_t at = 0; at < elements;) {
    if (room_ < width) {
      pieces_.emplace_back();
      room_ = kStateChunkBytes;
    }
    const std::size_t count = std::min(elements - at, room_ / width);
    for (const StateArray& array : group) {
      const std::size_t item = array.bytes.size() / elements;
      pieces_.back().push_back(array.bytes.subspan(at * item, count * item));
    }
    room_ -= count * width;
    at += count;
  }
}

std::size_t StatePieces::bytes_of(std::size_t piece) const {
  std::size_t total = 0;
  for (const auto& part : pieces_[piece]) total += part.size();
  return total;
}

void StatePieces::read(std::size_t piece, std::byte* out) const {
  for (const auto& part : pieces_[piece]) {
    std::memcpy(out, part.data(), part.size());
    out += part.size();
  }
}

void StatePieces::write(std::size_t piece, const std::byte* from) const {
  for (const auto& part : pieces_[piece]) {
    std::memcpy(part.data(), from, part.size());
    from += part.size();
  }
}

}  // namespace decotrain
