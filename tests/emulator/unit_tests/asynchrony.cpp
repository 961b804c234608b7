// What kernels must wait for: without the wait or the fence they fail on the emulator.
#include "check.h"
#include "run_ptx.h"

namespace unit_tests {
namespace {

std::array<std::string, 4> const kWords = {"u32", "u32", "u32", "u32"};

Lanes numbers() {
  Lanes result;
  for (int lane = 0; lane < 32; ++lane) {
    result[lane] = 1000 + lane;
  }
  return result;
}

Lanes run(std::string const& code) { return run_ptx(code, kWords, numbers()); }

bool fails(std::string const& code, char const* what) {
  try {
    run(code);
  } catch (emulator::Error const& error) {
    return std::string(error.what()).find(what) != std::string::npos;
  }
  return false;
}

// %s is where a lane's 16 bytes of shared memory are, %g those of `in`; q: whether it is lane 0.
std::string with_places(std::string const& code) {
  return "{ .reg .b32 %s, %m; .reg .b64 %g; .reg .pred q;\n"
         "mov.u32 %m, memory; mad.lo.u32 %s, %lane, 16, %m; ld.param.u64 %g, [in];\n"
         "mad.wide.u32 %g, %lane, 16, %g; setp.eq.u32 q, %lane, 0;\n" +
         code + "}";
}

void thread_copies_land_at_the_wait() {
  std::string const copy = "@!q bra SKIP; cp.async.cg.shared.global [%s], [%g], 16; SKIP:\n";
  std::string const load = "ld.shared.u32 %d, [%m+8];\n";
  auto const run_with = [&](std::string const& wait) {
    return run(with_places(copy + wait + load))[0];
  };
  CHECK(run_with("") == 0xffffffff);
  CHECK(run_with("cp.async.commit_group;") == 0xffffffff);
  CHECK(run_with("cp.async.commit_group; cp.async.wait_group 1;") == 0xffffffff);
  CHECK(run_with("cp.async.commit_group; cp.async.wait_group 0;") == 1001);
  CHECK(run_with("cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;") == 1001);
  CHECK(run_with("cp.async.wait_all;") == 1001);
  // The bytes that are not copied are zero.
  CHECK(run(with_places("cp.async.cg.shared.global [%s], [%g], 16, 4; cp.async.wait_all;"
                        "ld.shared.u32 %d, [%s+8];"))[3] == 0);
  CHECK(run(with_places("cp.async.cg.shared.global [%s], [%g], 16, 4; cp.async.wait_all;"
                        "ld.shared.u32 %d, [%s];"))[3] == 1006);
}

void bulk_loads_land_before_their_barrier() {
  std::string const copy =
      "@!q bra SKIP; mbarrier.init.shared::cta.b64 [%m], 1;\n"
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%m], 64;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%m+64], [%g], 64, [%m];\n"
      "SKIP: bar.warp.sync -1;\n";
  std::string const wait =
      "{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%m], 0;\n"
      "@!p bra WAIT; }\n";
  CHECK(run(with_places(copy + "ld.shared.u32 %d, [%m+72];\n" + wait))[9] == 0xffffffff);
  CHECK(run(with_places(copy + wait + "ld.shared.u32 %d, [%m+72];\n"))[9] == 1001);
  CHECK(fails(with_places(copy), "before a copy into its shared memory has landed"));
}

void bulk_stores_see_fenced_writes() {
  std::string const write = "st.shared.u32 [%s], %a; st.shared.u32 [%s+4], 0;\n";
  std::string const fence = "fence.proxy.async.shared::cta;\n";
  std::string const meet = "bar.sync 0;\n";
  std::string const store =
      "@!q bra SKIP; ld.param.u64 %g, [out];\n"
      "cp.async.bulk.global.shared::cta.bulk_group [%g], [%m], 16;\n"
      "cp.async.bulk.commit_group;\nSKIP:\n";
  std::string const wait = "cp.async.bulk.wait_group.read 0;\n";
  std::string const result = "bar.sync 0; ld.global.u32 %d, [%to];\n";
  CHECK(run(with_places(write + fence + meet + store + wait + result))[0] == 1000);
  CHECK(run(with_places(write + meet + "@q fence.proxy.async;\n" + store + wait + result))[0] ==
        1000);
  CHECK(fails(with_places(write + meet + store + wait), "without fence.proxy.async"));
  CHECK(fails(with_places(fence + write + meet + store + wait), "without fence.proxy.async"));
  CHECK(fails(with_places(write + fence + meet + store), "before a bulk store has read"));
}

// Operands of zeros: an m64n8k16 of them adds nothing to the accumulators.
std::string product(std::string const& before, std::string const& after) {
  return with_places(
      "{ .reg .f32 f<4>; .reg .b64 k; .reg .b32 n; .reg .pred one;\n"
      "st.shared.v4.u32 [%s], {0, 0, 0, 0}; st.shared.v4.u32 [%s+512], {0, 0, 0, 0};\n" +
      before +
      "mov.f32 f0, 0f40400000; mov.f32 f1, f0; mov.f32 f2, f0; mov.f32 f3, f0;\n"
      "shr.u32 n, %m, 4; cvt.u64.u32 k, n; or.b64 k, k, 0x1000080000;\n"
      "setp.eq.u32 one, %lane, %lane; wgmma.fence.sync.aligned;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {f0, f1, f2, f3}, k, k, one, 1, 1, 0, "
      "0;\nwgmma.commit_group.sync.aligned;\n" +
      after + "mov.b32 %d, f2; }\n");
}

void products_are_there_after_the_wait() {
  std::string const fence = "fence.proxy.async; bar.sync 0;\n";
  std::string const wait = "wgmma.wait_group.sync.aligned 0;\n";
  CHECK(run(product(fence, wait))[11] == 0x40400000);
  CHECK(fails(product(fence, ""), "before the wgmma.wait_group"));
  CHECK(fails(product(fence, "wgmma.wait_group.sync.aligned 1;\n"), "before the wgmma.wait_group"));
  CHECK(fails(product("", wait), "without fence.proxy.async"));
  std::string unfenced = product(fence, wait);
  std::string const fence_of_registers = "wgmma.fence.sync.aligned;";
  unfenced.erase(unfenced.find(fence_of_registers), fence_of_registers.size());
  CHECK(fails(unfenced, "after the last wgmma.fence"));
  // Operands are read when the product is computed: NaN written before the wait is seen.
  Lanes const late = run(product(fence, "st.shared.v4.u32 [%s], {-1, -1, -1, -1};\n" + wait));
  CHECK(late[0] != 0x40400000);
}

void barriers_count_threads() {
  CHECK(run("bar.sync 3, 32; mov.u32 %d, 5;")[2] == 5);
  CHECK(run("{ .reg .pred p, r; setp.eq.u32 p, %lane, 9; barrier.cta.red.or.pred r, 1, 32, p;"
            "selp.u32 %d, 1, 0, r; }")[2] == 1);
  CHECK(fails("bar.sync 3, 64;", "does not go on"));
  CHECK(fails("{ .reg .pred p; setp.eq.u32 p, %lane, 9; @p bar.sync 0; @!p bar.sync 1; }",
              "does not go on"));
}

}  // namespace

void test_asynchrony() {
  thread_copies_land_at_the_wait();
  bulk_loads_land_before_their_barrier();
  bulk_stores_see_fenced_writes();
  products_are_there_after_the_wait();
  barriers_count_threads();
}

}  // namespace unit_tests
