// Runs all tests, or those whose name contains an argument, without those named by an argument -name.
// Prints one line per test; exit code 1 if any check failed.
#include "testing.h"

namespace {

bool selected(const char *name, int count, char **arguments) {
  bool any = false, match = false;
  for (int i = 0; i < count; ++i) {
    if (arguments[i][0] == '-') {
      if (std::strcmp(arguments[i] + 1, name) == 0) return false;
      continue;
    }
    any = true;
    match = match || std::strstr(name, arguments[i]) != nullptr;
  }
  return match || !any;
}

}  // namespace

int main(int argc, char **argv) {
  int run = 0;
  for (const testing::Test &test : testing::tests()) {
    if (!selected(test.name, argc - 1, argv + 1)) continue;
    const int before = testing::failures();
    test.body();
    ++run;
    std::printf("%s %s\n", testing::failures() == before ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed checks\n", run, testing::failures());
  return testing::failures() == 0 && run > 0 ? 0 : 1;
}
