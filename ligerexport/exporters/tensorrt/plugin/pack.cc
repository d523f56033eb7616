#include "pack.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <set>

namespace liger {
namespace {

constexpr char kMagic[] = "LIGERPK2";
constexpr size_t kMagicSize = sizeof(kMagic) - 1;

[[noreturn]] void damaged(const std::string& what) { throw Error("the kernel pack is damaged: " + what); }

constexpr uint32_t kPtx = 1 << 16;  // beside a compute capability: text for that one or any later

// How well code suits a device, 0 for not at all. Code that the driver must compile comes last.
uint32_t rank_on(uint32_t built, uint32_t sm) {
  if (built == sm) return UINT32_MAX;
  if (built & kPtx) return (built ^ kPtx) <= sm;
  return built / 10 == 8 && sm / 10 == 8 && built < sm ? built : 0;
}

// Takes values off the front of a file.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : at_(data), left_(size) {}

  const uint8_t* Take(uint64_t size) {
    if (size > left_) damaged("it ends too early");
    const uint8_t* taken = at_;
    at_ += size, left_ -= size;
    return taken;
  }

  template <typename T>
  T Get() {
    T value;  // the file and every machine with CUDA are little-endian
    std::memcpy(&value, Take(sizeof(T)), sizeof(T));
    return value;
  }

  template <typename T>
  T Kind(T end) {
    const auto value = Get<uint8_t>();
    if (value >= end) damaged("it has a kind that is not known");
    return static_cast<T>(value);
  }

  uint32_t Index(size_t size) {
    const auto value = Get<uint32_t>();
    if (value >= size) damaged("it refers to what is not there");
    return value;
  }

  std::string Text() {
    const auto size = Get<uint32_t>();
    std::string text(reinterpret_cast<const char*>(Take(size)), size);
    for (const char c : text)  // errors print names, which must not control a terminal
      if (c < ' ' || c > '~') damaged("a name is not plain text");
    return text;
  }

  template <typename F>
  auto List(F read) {
    std::vector<decltype(read())> items;
    for (auto count = Get<uint32_t>(); count > 0; --count) items.push_back(read());  // a wrong count hits the end
    return items;
  }

  bool Done() const { return left_ == 0; }

 private:
  const uint8_t* at_;
  size_t left_;
};

Expression expression(Reader& in, size_t axes) {
  Expression made;
  size_t depth = 0;
  made.terms = in.List([&] {
    const auto kind = in.Kind(Expression::kKinds);
    const auto value = in.Get<int64_t>();
    if (kind == Expression::kAxis && (value < 0 || static_cast<uint64_t>(value) >= axes)) damaged("an axis is unknown");
    const bool operand = kind == Expression::kNumber || kind == Expression::kAxis;
    if (!operand && depth < 2) damaged("an operator has no operands");
    depth = operand ? depth + 1 : depth - 1;
    return Expression::Term{kind, value};
  });
  if (depth != 1) damaged("an expression has no single value");
  return made;
}

Kernel kernel(Reader& in) {
  Kernel made;
  made.hidden = in.Get<uint32_t>();
  made.overlaps = in.Get<uint8_t>() != 0;
  made.arguments = in.List([&] {
    const auto type = in.Kind(Kernel::kTypes);
    return Kernel::Argument{type, std::max<uint8_t>(1, in.Get<uint8_t>())};
  });
  if (made.hidden > made.arguments.size()) damaged("a kernel has more hidden arguments than arguments");
  made.cubins = in.List([&] {
    Cubin cubin;
    cubin.sm = in.Get<uint32_t>(), cubin.threads = in.Get<uint32_t>();
    cubin.shared = in.Get<uint32_t>(), cubin.blob = in.Get<uint32_t>();
    cubin.symbol = in.Text();
    return cubin;
  });
  return made;
}

Buffer buffer(Reader& in, size_t axes) {
  Buffer made;
  made.name = in.Text();
  made.role = in.Kind(Buffer::kRoles);
  made.width = in.Get<uint8_t>();
  made.zero = in.Get<uint8_t>() != 0;
  made.table = in.Kind(Buffer::kTables);
  if ((made.role == Buffer::kTable) != (made.table != Buffer::kNone)) damaged("a table is not known");
  made.shape = in.List([&] { return expression(in, axes); });
  if (made.role == Buffer::kConstant) made.content = in.List([&] { return in.Get<int32_t>(); });
  return made;
}

Launch launch(Reader& in, const std::vector<Kernel>& kernels, size_t buffers, size_t axes) {
  Launch made;
  made.kernel = in.Index(kernels.size());
  const Kernel& kernel = kernels[made.kernel];
  for (auto& size : made.grid) size = expression(in, axes);
  size_t i = 0;
  made.values = in.List([&] {
    Value value{};
    value.kind = in.Kind(Value::kKinds);
    if (i + kernel.hidden >= kernel.arguments.size()) damaged("a launch has too many arguments");
    const auto type = kernel.arguments[i++].type;
    const bool integer = type == Kernel::kInt32 || type == Kernel::kInt64;
    if (value.kind != (type == Kernel::kPointer ? Value::kAddress : integer ? Value::kInteger : Value::kNumber))
      damaged("an argument is of another type than its kernel takes");
    if (value.kind == Value::kAddress) value.buffer = in.Index(buffers);
    if (value.kind == Value::kNumber) value.number = in.Get<float>();
    else value.expression = expression(in, axes);
    return value;
  });
  if (i + kernel.hidden != kernel.arguments.size()) damaged("a launch has too few arguments");
  return made;
}

Plan plan(Reader& in, const std::vector<Kernel>& kernels) {
  Plan made;
  made.layer = in.Text(), made.op = in.Text(), made.dtype = in.Text();
  made.sms = in.List([&] { return in.Get<uint32_t>(); });
  made.axes = in.List([&] { return in.Text(); });
  made.derived = in.List([&] {
    std::string name = in.Text();
    Expression value = expression(in, made.axes.size());
    made.axes.push_back(std::move(name));
    return value;
  });
  const size_t axes = made.axes.size();
  made.ranges = in.List([&] {
    Range range;
    range.axis = in.Index(axes);
    range.low = in.Get<int64_t>(), range.high = in.Get<int64_t>();
    return range;
  });
  made.buffers = in.List([&] { return buffer(in, axes); });
  made.launches = in.List([&] { return launch(in, kernels, made.buffers.size(), axes); });
  for (uint32_t sm : made.sms)
    for (const Launch& x : made.launches)
      if (kernels[x.kernel].For(sm) == nullptr) damaged("a plan has no kernel for sm_" + std::to_string(sm));
  return made;
}

}  // namespace

int64_t Expression::operator()(const std::vector<int64_t>& axes) const {
  std::vector<int64_t> stack;
  stack.reserve(terms.size());
  for (const Term& term : terms) {
    if (term.kind == kNumber || term.kind == kAxis) {
      stack.push_back(term.kind == kNumber ? term.value : axes[term.value]);
      continue;
    }
    const int64_t b = stack.back();
    stack.pop_back();
    int64_t& a = stack.back();
    bool over = false;
    switch (term.kind) {
      case kAdd: over = __builtin_add_overflow(a, b, &a); break;
      case kSubtract: over = __builtin_sub_overflow(a, b, &a); break;
      case kMultiply: over = __builtin_mul_overflow(a, b, &a); break;
      default:
        if (b <= 0) damaged("a divisor is not positive");
        a = a / b + (a % b > 0);
    }
    if (over) damaged("a size is too large");
  }
  return stack.back();
}

const Cubin* Kernel::For(uint32_t sm) const {
  const Cubin* best = nullptr;
  for (const Cubin& x : cubins)
    if (rank_on(x.sm, sm) > (best == nullptr ? 0 : rank_on(best->sm, sm))) best = &x;
  return best;
}

int64_t Buffer::Bytes(const std::vector<int64_t>& axes) const {
  int64_t bytes = width;
  for (const Expression& size : shape) {
    const int64_t elements = size(axes);
    if (elements < 0 || __builtin_mul_overflow(bytes, elements, &bytes)) damaged("'" + name + "' has no size");
  }
  return bytes;
}

std::vector<int64_t> Plan::Fit(const Axes& given) const {
  std::vector<int64_t> values;
  values.reserve(axes.size());
  for (size_t i = 0; i + derived.size() < axes.size(); ++i) {
    const auto found = given.find(axes[i]);
    if (found == given.end()) damaged("a plan needs the axis '" + axes[i] + "'");
    values.push_back(found->second);
  }
  for (const Expression& x : derived) values.push_back(x(values));
  for (const Range& range : ranges)
    if (values[range.axis] < range.low || values[range.axis] > range.high) return {};
  return values;
}

int64_t Plan::Value(const std::string& axis, const std::vector<int64_t>& values) const {
  for (size_t i = 0; i < axes.size(); ++i)
    if (axes[i] == axis) return values[i];
  damaged("a plan has no axis '" + axis + "'");
}

Pack Pack::Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::vector<uint8_t> bytes(file ? static_cast<size_t>(file.tellg()) : 0);
  file.seekg(0);
  if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size())))
    throw Error("cannot read the kernel pack " + path);
  return Pack(bytes);
}

Pack::Pack(const std::vector<uint8_t>& bytes) {
  constexpr size_t kSum = sizeof(uint32_t);
  if (bytes.size() < kMagicSize + kSum || std::memcmp(bytes.data(), kMagic, kMagicSize) != 0)
    throw Error("this is no kernel pack of this version");
  const size_t size = bytes.size() - kSum;
  if (Reader(bytes.data() + size, kSum).Get<uint32_t>() != crc32(bytes.data(), size))
    damaged("its check sum is another");
  Reader in(bytes.data() + kMagicSize, size - kMagicSize);
  kernels_ = in.List([&] { return kernel(in); });
  plans_ = in.List([&] { return plan(in, kernels_); });
  blobs_ = in.List([&] {
    const auto length = in.Get<uint64_t>();
    const uint8_t* const code = in.Take(length);
    return Blob(code, code + length);
  });
  if (!in.Done()) damaged("something follows its end");
  for (const Kernel& x : kernels_)
    for (const Cubin& cubin : x.cubins)
      if (cubin.blob >= blobs_.size()) damaged("a kernel has no code");
}

uint32_t Pack::Serving(const std::string& layer, const std::string& dtype, uint32_t sm) const {
  uint32_t best = 0;
  for (const Plan& x : plans_)
    if (x.layer == layer && x.dtype == dtype)
      for (uint32_t built : x.sms)
        if (rank_on(built, sm) > (best == 0 ? 0 : rank_on(best, sm))) best = built;
  if (best > 0) return best;
  std::set<std::string> known;
  for (const Plan& x : plans_)
    if (x.layer == layer)
      for (uint32_t built : x.sms)
        known.insert((built & kPtx ? " PTX of sm_" : " sm_") + std::to_string(built & ~kPtx) + "/" + x.dtype);
  std::string text = "the kernel pack has nothing for layer " + layer + " on sm_" + std::to_string(sm) + " in " +
                     dtype + "; for this layer there is:";
  for (const std::string& x : known) text += x;
  throw Error(known.empty() ? text + " nothing" : text);
}

uint32_t crc32(const uint8_t* data, size_t size) {
  static const auto table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t i = 0; i < 256; ++i) {
      made[i] = i;
      for (int bit = 0; bit < 8; ++bit) made[i] = made[i] >> 1 ^ (made[i] & 1 ? 0xEDB88320u : 0);
    }
    return made;
  }();
  uint32_t sum = ~0u;
  for (size_t i = 0; i < size; ++i) sum = sum >> 8 ^ table[(sum ^ data[i]) & 255];
  return ~sum;
}

}  // namespace liger
