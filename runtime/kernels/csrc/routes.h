// The tensor that Route makes once a run and every site reads: [R + 1, 14] int64, used as bytes.
//
// Rows are sorted by slot and cut into tiles of at most 16, 32 and 64 rows of one slot; base rows
// come last, as slot 0. A tile's slot is -1 behind the last one, so the counts are read by few.
#pragma once

#include <cstddef>
#include <cstdint>

#include "site.h"

namespace lora {

constexpr int64_t kRouteWords = 14;  // a row's share: 112 bytes, the sum of the arrays below

// A tile of at most 32 or 64 rows: rows[begin .. begin + count).
struct alignas(16) Run {
  int slot;
  int begin;
  int count;
  int unused;
};

struct Routes {
  int* tiles;      // [4]: how many tiles of 16, 32, 64 rows
  Run* runs32;     // [R]
  Run* runs64;     // [R]
  int* rows;       // [R, 16]: row numbers; a slot begins at a multiple of 16, -1 fills the gap
  int64_t* slots;  // [R]: as given, but 0 for what counts as the base
  int* slots16;    // [R]: the slot of each 16 of `rows`

  LORA_BOTH static Routes in(void* routes, int64_t rows) {
    char* at = static_cast<char*>(routes) + 16;
    Routes found;
    found.tiles = static_cast<int*>(routes);
    found.runs32 = reinterpret_cast<Run*>(at);
    found.runs64 = found.runs32 + rows;
    found.rows = reinterpret_cast<int*>(found.runs64 + rows);
    found.slots = reinterpret_cast<int64_t*>(found.rows + 16 * rows);
    found.slots16 = reinterpret_cast<int*>(found.slots + rows);
    return found;
  }
};

}  // namespace lora
