// One byte for one scalar: a sign and a logarithm in steps of a sixth of an octave.
//
//   0x00          nothing: the sample failed (not a number, out of memory ...); not counted
//   0x80          zero: counted, moves nothing
//   s kkkkkkk     (-1)^s * 2^((k - 64) / 6), k = 1..127: 6.9e-4 to 1.4e3, wrong by 6 % at most
//
// Decoding is a look-up in a table that stands here, never a call of pow: every peer, the sender
// included, applies the decoded byte.
#pragma once

#include "host_device.h"

namespace decotrain::spsa {

constexpr std::uint8_t kSkip = 0x00;
constexpr std::uint8_t kZero = 0x80;

// clang-format off
constexpr float kMagnitude[128] = {
    0x0p+0f, 0x1.6a09e6p-11f, 0x1.965feap-11f, 0x1.c823ep-11f,
    0x1p-10f, 0x1.1f59acp-10f, 0x1.428a3p-10f, 0x1.6a09e6p-10f,
    0x1.965feap-10f, 0x1.c823ep-10f, 0x1p-9f, 0x1.1f59acp-9f,
    0x1.428a3p-9f, 0x1.6a09e6p-9f, 0x1.965feap-9f, 0x1.c823ep-9f,
    0x1p-8f, 0x1.1f59acp-8f, 0x1.428a3p-8f, 0x1.6a09e6p-8f,
    0x1.965feap-8f, 0x1.c823ep-8f, 0x1p-7f, 0x1.1f59acp-7f,
    0x1.428a3p-7f, 0x1.6a09e6p-7f, 0x1.965feap-7f, 0x1.c823ep-7f,
    0x1p-6f, 0x1.1f59acp-6f, 0x1.428a3p-6f, 0x1.6a09e6p-6f,
    0x1.965feap-6f, 0x1.c823ep-6f, 0x1p-5f, 0x1.1f59acp-5f,
    0x1.428a3p-5f, 0x1.6a09e6p-5f, 0x1.965feap-5f, 0x1.c823ep-5f,
    0x1p-4f, 0x1.1f59acp-4f, 0x1.428a3p-4f, 0x1.6a09e6p-4f,
    0x1.965feap-4f, 0x1.c823ep-4f, 0x1p-3f, 0x1.1f59acp-3f,
    0x1.428a3p-3f, 0x1.6a09e6p-3f, 0x1.965feap-3f, 0x1.c823ep-3f,
    0x1p-2f, 0x1.1f59acp-2f, 0x1.428a3p-2f, 0x1.6a09e6p-2f,
    0x1.965feap-2f, 0x1.c823ep-2f, 0x1p-1f, 0x1.1f59acp-1f,
    0x1.428a3p-1f, 0x1.6a09e6p-1f, 0x1.965feap-1f, 0x1.c823ep-1f,
    0x1p+0f, 0x1.1f59acp+0f, 0x1.428a3p+0f, 0x1.6a09e6p+0f,
    0x1.965feap+0f, 0x1.c823ep+0f, 0x1p+1f, 0x1.1f59acp+1f,
    0x1.428a3p+1f, 0x1.6a09e6p+1f, 0x1.965feap+1f, 0x1.c823ep+1f,
    0x1p+2f, 0x1.1f59acp+2f, 0x1.428a3p+2f, 0x1.6a09e6p+2f,
    0x1.965feap+2f, 0x1.c823ep+2f, 0x1p+3f, 0x1.1f59acp+3f,
    0x1.428a3p+3f, 0x1.6a09e6p+3f, 0x1.965feap+3f, 0x1.c823ep+3f,
    0x1p+4f, 0x1.1f59acp+4f, 0x1.428a3p+4f, 0x1.6a09e6p+4f,
    0x1.965feap+4f, 0x1.c823ep+4f, 0x1p+5f, 0x1.1f59acp+5f,
    0x1.428a3p+5f, 0x1.6a09e6p+5f, 0x1.965feap+5f, 0x1.c823ep+5f,
    0x1p+6f, 0x1.1f59acp+6f, 0x1.428a3p+6f, 0x1.6a09e6p+6f,
    0x1.965feap+6f, 0x1.c823ep+6f, 0x1p+7f, 0x1.1f59acp+7f,
    0x1.428a3p+7f, 0x1.6a09e6p+7f, 0x1.965feap+7f, 0x1.c823ep+7f,
    0x1p+8f, 0x1.1f59acp+8f, 0x1.428a3p+8f, 0x1.6a09e6p+8f,
    0x1.965feap+8f, 0x1.c823ep+8f, 0x1p+9f, 0x1.1f59acp+9f,
    0x1.428a3p+9f, 0x1.6a09e6p+9f, 0x1.965feap+9f, 0x1.c823ep+9f,
    0x1p+10f, 0x1.1f59acp+10f, 0x1.428a3p+10f, 0x1.6a09e6p+10f,
};
// clang-format on

// The nearest code; kSkip for NaN and infinity, the largest magnitude for what is beyond it.
std::uint8_t encode(float value);

// The value; kSkip gives 0 too (ask for kSkip first where it matters).
inline float decode(std::uint8_t code) {
  const float magnitude = kMagnitude[code & 0x7f];
  return (code & 0x80) != 0 ? -magnitude : magnitude;
}

}  // namespace decotrain::spsa
