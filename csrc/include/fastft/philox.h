// Philox4x32 (Salmon et al. 2011), 7 rounds: the fewest that pass BigCrush. Counter based, so a
// dropout mask depends on the seed and the position alone, never on threads or vector width.
#pragma once

#include "fastft/numeric.h"

namespace fastft {
inline namespace FASTFT_ISA {

constexpr int kPhiloxRounds = 7;

FASTFT_HD void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t key0,
                            uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
  const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
  const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
  const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
  c1 = static_cast<uint32_t>(product1);
  c3 = static_cast<uint32_t>(product0);
  c0 = next0;
  c2 = next2;
}

}  // namespace FASTFT_ISA
}  // namespace fastft
