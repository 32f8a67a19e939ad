// head_scan.cu beside head_scan.cpp, which takes its place in the operators' tests: the same bytes
// everywhere, also where nothing is to be written. One call, stated by the arguments: name=value.

#include <cstdio>
#include <map>
#include <random>
#include <string>

#define launch_head_scan launch_plain_head_scan
#include "head_scan.cpp"
#undef launch_head_scan

namespace emulator {
extern int resident_clusters;
}

namespace bupo::cuda::sm90 {
cudaError_t launch_head_scan(Schedule schedule, const ScanArgs& args, cudaStream_t stream);

namespace {

std::map<std::string, double> given;
int64_t number(const char* name, int64_t otherwise = 0) {
  const auto found = given.find(name);
  return found == given.end() ? otherwise : static_cast<int64_t>(found->second);
}

std::mt19937 generator(7);
float normal(float scale) { return scale * std::normal_distribution<float>()(generator); }

// Numbers in the first `rows` rows and `width` columns, nan in all others.
std::vector<uint16_t> matrix(int64_t rows, int64_t all_rows, int64_t width, int64_t stride,
                             float scale) {
  std::vector<uint16_t> data(static_cast<size_t>(all_rows * stride), 0x7fff);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < width; ++d)
      data[static_cast<size_t>(r * stride + d)] = emulator::to_bfloat16(normal(scale));
  return data;
}

struct Results {
  std::vector<float> partials, target_logits, references;
  std::vector<uint16_t> e;
  Results(int64_t capacity, int64_t tiles, int64_t stride)
      : partials(static_cast<size_t>(3 * tiles * capacity), -7.0f),
        target_logits(static_cast<size_t>(capacity), -7.0f),
        references(static_cast<size_t>(capacity * tiles), -7.0f),
        e(static_cast<size_t>(capacity * stride + 8), 0xabab) {}
};

template <class T>
bool same(const char* name, const std::vector<T>& got, const std::vector<T>& truth) {
  size_t count = 0, first = 0;
  for (size_t i = got.size(); i-- > 0;)
    if (std::memcmp(&got[i], &truth[i], sizeof(T)) != 0) ++count, first = i;
  if (count)
    std::printf("%s: %zu of %zu differ, the first at %zu: %g, should be %g\n", name, count,
                got.size(), first, static_cast<double>(got[first]),
                static_cast<double>(truth[first]));
  return count == 0;
}

bool check() {
  const Schedule schedule = number("pingpong") ? Schedule::kPingpong : Schedule::kCooperative;
  const int64_t capacity = number("capacity", 128), vocab = number("vocab", 256);
  const int64_t rows = number("rows", capacity), width = number("width", 64);
  const int64_t hidden_stride = number("hidden_stride", width);
  const int64_t weight_stride = number("weight_stride", width);
  const int64_t e_stride = (vocab + 63) / 64 * 64, tiles = tiles_of(vocab, columns_of(schedule));
  const auto hidden = matrix(rows, capacity, width, hidden_stride, 1.0f);
  const auto weight = matrix(vocab, vocab, width, weight_stride, 0.7f);
  int32_t counts[2] = {static_cast<int32_t>(rows),
                             static_cast<int32_t>(number("stored", rows))};
  std::vector<int64_t> targets;
  std::vector<float> guess, temperature, bias;
  for (int64_t r = 0; r < capacity; ++r) {
    targets.push_back(r % 9 == 8 ? -100 : static_cast<int64_t>(generator() % vocab));
    guess.push_back(std::round(normal(20.0f)));
    temperature.push_back(0.5f + static_cast<float>(r % 4));
  }
  for (int64_t j = 0; j < tiles * columns_of(schedule); ++j) bias.push_back(normal(1.0f));

  const auto run = [&](auto* launch, Results& results) {
    ScanArgs args{};
    args.hidden = hidden.data();
    args.weight = weight.data();
    args.hidden_stride = hidden_stride;
    args.weight_stride = weight_stride;
    args.width = width;
    args.vocab = vocab;
    args.places = {counts, nullptr, targets.data(),
                   number("temperature") ? temperature.data() : nullptr, capacity};
    if (number("bias")) args.bias = bias.data();
    args.partials = reinterpret_cast<BitSums*>(results.partials.data());
    args.target_logits = results.target_logits.data();
    args.tiles = tiles;
    if (number("store")) {
      const auto place = reinterpret_cast<uintptr_t>(results.e.data());
      args.kept = {reinterpret_cast<BFloat16*>((place + 15) / 16 * 16), e_stride, guess.data(),
                   results.references.data()};
    }
    return launch(schedule, args, nullptr);
  };
  Results truth(capacity, tiles, e_stride);
  run(launch_plain_head_scan, truth);
  bool fine = true;
  const int64_t first = number("seed");
  for (int64_t seed = first; fine && seed < first + number("seeds", 1); ++seed) {
    Results got(capacity, tiles, e_stride);
    emulator::seed = static_cast<uint64_t>(seed);
    emulator::draws = 0;
    emulator::resident_clusters = static_cast<int>(number("clusters", 1));
    try {
      const cudaError_t error = run(launch_head_scan, got);
      if (error != cudaSuccess) std::printf("error %d\n", static_cast<int>(error));
      fine = error == cudaSuccess &&
             same("partials", got.partials, truth.partials) &
                 same("target logits", got.target_logits, truth.target_logits) &
                 same("references", got.references, truth.references) & same("E", got.e, truth.e);
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      fine = false;
    }
    if (!fine) std::printf("with seed %ld\n", static_cast<long>(seed));
  }
  return fine;
}

}  // namespace
}  // namespace bupo::cuda::sm90

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const size_t equals = argument.find('=');
    bupo::cuda::sm90::given[argument.substr(0, equals)] = std::stod(argument.substr(equals + 1));
  }
  return bupo::cuda::sm90::check() ? 0 : 1;
}
