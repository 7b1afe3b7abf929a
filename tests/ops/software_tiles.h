// The tiles of AMX in plain C++, as Intel's manual defines their instructions, for processors that have none:
// with -DVIMAMBA_AMX -include of this file the kernels are the portable ones with AMX's products. What the
// processor refuses ends the program.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// The processor's own are declared first, then their names are taken.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#undef _tile_release
#define _tile_release software_tile_release
#undef _tile_loadconfig
#define _tile_loadconfig software_tile_loadconfig
#undef _tile_zero
#define _tile_zero software_tile_zero
#undef _tile_loadd
#define _tile_loadd software_tile_loadd
#undef _tile_stored
#define _tile_stored software_tile_stored
#undef _tile_dpbf16ps
#define _tile_dpbf16ps software_tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_dpbsud software_tile_dpbsud

struct SoftwareTile {
  int rows = 0, row_bytes = 0;
  alignas(64) uint8_t data[16][64] = {};
};

inline SoftwareTile software_tiles[8];

inline void require(bool allowed, const char* what) {
  if (allowed) return;
  std::printf("tiles: %s\n", what);
  std::exit(1);
}

inline void _tile_release() {
  for (SoftwareTile& tile : software_tiles) tile = {};
}

inline void _tile_loadconfig(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  require(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0 only");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes are zero");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    const int rows = bytes[48 + i];
    require(row_bytes <= 64 && rows <= 16 && (row_bytes == 0) == (rows == 0), "at most 16 rows of 64 bytes");
    require(i < 8 || rows == 0, "eight tiles");
    if (i < 8) software_tiles[i] = {rows, row_bytes};
  }
}

inline SoftwareTile& configured(int tile) {
  require(software_tiles[tile].rows > 0, "a tile is not configured");
  return software_tiles[tile];
}

inline void _tile_zero(int tile) { std::memset(configured(tile).data, 0, sizeof SoftwareTile::data); }

inline void _tile_loadd(int to, const void* from, int64_t stride) {
  SoftwareTile& tile = configured(to);
  std::memset(tile.data, 0, sizeof tile.data);
  for (int i = 0; i < tile.rows; ++i)
    std::memcpy(tile.data[i], static_cast<const char*>(from) + i * stride, tile.row_bytes);
}

inline void _tile_stored(int from, void* to, int64_t stride) {
  const SoftwareTile& tile = configured(from);
  for (int i = 0; i < tile.rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, tile.data[i], tile.row_bytes);
}

// sums[m][n] gains multiply(words a[m][k], b[k][n]) over k.
template <class Sum, class F>
inline void software_product(int to, int of, int by, const F& multiply) {
  SoftwareTile& sums = configured(to);
  const SoftwareTile &a = configured(of), &b = configured(by);
  require(sums.rows == a.rows && sums.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows,
          "shapes of a product do not fit");
  for (int m = 0; m < a.rows; ++m)
    for (int k = 0; k < b.rows; ++k)
      for (int n = 0; n < b.row_bytes / 4; ++n) {
        Sum sum;
        std::memcpy(&sum, sums.data[m] + 4 * n, 4);
        sum = multiply(sum, a.data[m] + 4 * k, b.data[k] + 4 * n);
        std::memcpy(sums.data[m] + 4 * n, &sum, 4);
      }
}

inline void _tile_dpbf16ps(int to, int of, int by) {
  const auto at = [](const uint8_t* word, int half) {
    const uint32_t bits = uint32_t(word[2 * half] | word[2 * half + 1] << 8) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  software_product<float>(to, of, by, [&](float sum, const uint8_t* a, const uint8_t* b) {
    return sum + at(a, 0) * at(b, 0) + at(a, 1) * at(b, 1);
  });
}

// Signed bytes of `of` times unsigned ones of `by`.
inline void _tile_dpbsud(int to, int of, int by) {
  software_product<int32_t>(to, of, by, [](int32_t sum, const uint8_t* a, const uint8_t* b) {
    for (int i = 0; i < 4; ++i) sum += int8_t(a[i]) * b[i];
    return sum;
  });
}
