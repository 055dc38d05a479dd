// Collectives between the processes of a group, in rounds (rounds.h).
//
// Sums are taken in the order of ranks, on every rank, so that all get the same bits, and get them again.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "dtype.h"
#include "rounds.h"

namespace vllm_ms {

class Group : public Rounds {
 public:
  using Rounds::Rounds;

  // out[i] = sum over ranks of x[i]. x may be out.
  void all_reduce(const void *x, int64_t count, DType dtype, void *out);
  // out [outer, size, inner] from each rank's x [outer, inner].
  void all_gather(const void *x, int64_t outer, int64_t inner, DType dtype, void *out);
  // out [outer, inner] = sum over ranks of x [outer, size, inner] at this rank's place.
  void reduce_scatter(const void *x, int64_t outer, int64_t inner, DType dtype, void *out);
  void barrier();

 private:
  template <class Write, class PartOf, class Read>
  void in_rounds(Collective kind, int64_t bytes, int64_t count, int64_t per_round, Write write, PartOf part_of,
                 Read read);
  int64_t round_bytes() const;
};

// The groups of this process, by name. join_group throws std::runtime_error where the memory is not that of such a group.
Group &join_group(const GroupOptions &options);
void leave_group(const std::string &name);
void fail_groups(const std::string &reason);
void set_group_timeout(double seconds);  // of all groups
void flush_groups(double seconds);       // see Links::flush
std::string lost_rank();                 // of any group; see Links::lost
Group &group(const std::string &name);  // throws std::runtime_error where it is not joined

}  // namespace vllm_ms
