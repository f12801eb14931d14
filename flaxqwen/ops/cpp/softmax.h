// What the kernels of attention share: the exponential function of a softmax.

#pragma once

#include "common.h"

#include <cmath>
#include <limits>

// The score of a slot that is not seen.
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

// e^x for x <= 0: 2^n e^r with n an integer and |r| <= ln(2) / 2, by Taylor's polynomial; 0 below -87. Off by 1e-7.
INLINE float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded, to an integer in its last bits
  float bounded = x < -87.0f ? -87.0f : x;
  float rounded = std::fma(bounded, 1.44269504f, kRound);
  float n = rounded - kRound;
  float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, bounded));
  float p = std::fma(1.0f / 5040, r, 1.0f / 720);  // a loop over the factors would not be vectorised
  p = std::fma(p, r, 1.0f / 120);
  p = std::fma(p, r, 1.0f / 24);
  p = std::fma(p, r, 1.0f / 6);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  uint32_t power = (bits_as<uint32_t>(rounded) << 23) + (127u << 23);
  return p * bits_as<float>(x < -87.0f ? 0u : power);
}
