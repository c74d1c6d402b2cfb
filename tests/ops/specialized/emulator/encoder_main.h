// Launches the persistent encoder; maps hold, for each matrix, its address, rows, columns, and rows of a tile. 0 if it came to
// its end.
extern "C" int run(const u64* maps, const u64* pointers, u16* normed, u16* middle, u16* qkv, u16* attended, u16* activations, float* partials, u16* result,
                   u32* arrivals, u32* turns, const int* starts, int sequences, int rows) {
    std::vector<Map> all(4 * LAYERS);
    for (size_t i = 0; i < all.size(); ++i) all[i] = {(const u16*)maps[4 * i], maps[4 * i + 1], maps[4 * i + 2], maps[4 * i + 3], {}};
    const auto kernel = [&] {
        persistent_encoder(all.data(), pointers, normed, middle, qkv, attended, activations, partials, result, arrivals, turns, starts,
                           sequences, rows);
    };
    return emulated::launch(BLOCKS, THREADS, kernel) ? 0 : 1;
}
