// Launches the persistent decode kernel. 0 if it came to its end.
extern "C" int run(const u64* table, u64* out, int steps, int greedy) {
    const auto kernel = [&] { persistent_decode(table, out, steps, greedy); };
    return emulated::launch(BLOCKS, THREADS + 32 + HELPERS + 32, kernel) ? 0 : 1;
}
