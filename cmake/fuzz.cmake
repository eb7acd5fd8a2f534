# orlop_fuzz: the fuzzers of every decoder in one program (fuzz/main.cc), for clang alone. Only the decoders' own sources and fuzz/ are
# compiled here, with sanitizers and counters of coverage. All else that they call is linked from the archives of the release build, which
# must be there: so the program takes a minute to compile, not ten.
set(decoders_1 base/box.cc base/thread_pool.cc proto/chunk.cc proto/parse_bound.cc proto/status.cc server/step/check.cc server/step/job.cc)
set(decoders_2 server/job/contributions.cc server/job/definition.cc server/job/job_model.cc server/job/manifest.cc
               server/job/optimizer_config.cc server/job/slots.cc server/job/step_codec.cc)
set(decoders_3 server/shards/gradient_stage.cc server/shards/load_stage.cc server/shards/shard_image.cc server/durability/flush.cc
               server/durability/flush_shard.cc server/runtime/step_scalars.cc server/lanes/region.cc)
set(decoders_4 server/config.cc cli/safetensors.cc)
set(decoders_5 server/services/roles.cc)
file(GLOB fuzzers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/fuzz/*.cc)
# The preset `fuzz` compiles the sources of a group as one, since most of the time goes into headers.
foreach(group decoders_1 decoders_2 decoders_3 decoders_4 decoders_5 fuzzers)
  set_source_files_properties(${${group}} PROPERTIES UNITY_GROUP ${group})
endforeach()
file(GLOB protos CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/proto/orlop/v1/*.proto)
foreach(proto ${protos})
  get_filename_component(stem ${proto} NAME_WE)
  list(APPEND messages ${PROJECT_BINARY_DIR}/generated/orlop/v1/${stem}.pb.cc)
endforeach()

add_executable(orlop_fuzz EXCLUDE_FROM_ALL ${decoders_1} ${decoders_2} ${decoders_3} ${decoders_4} ${decoders_5} ${fuzzers} ${messages})
set_target_properties(orlop_fuzz PROPERTIES UNITY_BUILD_MODE GROUP)
add_dependencies(orlop_fuzz orlop_generated)
target_include_directories(orlop_fuzz PRIVATE ${PROJECT_SOURCE_DIR})
target_include_directories(orlop_fuzz SYSTEM PRIVATE ${PROJECT_BINARY_DIR}/generated)
# vptr needs type information of libraries that are not compiled here.
set(sanitizers -fsanitize=fuzzer,address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined)
# libabsl is compiled by GCC, which mangles a constrained template as clang did before version 18.
target_compile_options(orlop_fuzz PRIVATE ${sanitizers} -O1 -gline-tables-only -fno-omit-frame-pointer -fclang-abi-compat=17
                                          -fprofile-instr-generate -fcoverage-mapping)
target_link_options(orlop_fuzz PRIVATE ${sanitizers} -fprofile-instr-generate)

foreach(folder server server/services server/lanes server/runtime server/durability server/cluster server/shards server/tiers server/job
               server/memory server/step storage kernels proto base cli)
  orlop_target(${folder} library)
  list(APPEND archives ${PROJECT_SOURCE_DIR}/build/release/lib/lib${library}.a)
endforeach()
set_property(TARGET orlop_fuzz PROPERTY LINK_DEPENDS ${archives})
target_link_libraries(orlop_fuzz PRIVATE
  -Wl,--start-group ${archives} -Wl,--end-group
  gRPC::grpc++ gRPC::grpc++_reflection protobuf::libprotobuf absl::status absl::statusor absl::span absl::strings absl::flat_hash_map
  RocksDB::rocksdb spdlog::spdlog CLI11::CLI11 tomlplusplus::tomlplusplus nlohmann_json::nlohmann_json hwy::hwy ${OPENBLAS} xxhash
  GTest::gmock GTest::gtest Threads::Threads)
