# The compiler's settings for all targets, and the functions that make the targets of a folder. CMakeLists.txt calls them and has the graph
# of dependencies.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
set(CMAKE_ARCHIVE_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
add_compile_definitions(ORLOP_VERSION="${PROJECT_VERSION}")
set(warnings -Wall -Wextra -Wno-unused-parameter -Wno-missing-field-initializers)
# -ffp-contract=off: the compiler must not fuse a product and a sum by itself, because all machines must compute the same bits
# (ARCHITECTURE.md, "Arithmetic"). -ffast-math must never be added.
add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:${warnings};-ffp-contract=off>")
if(CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
  add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-Wthread-safety;-Werror=thread-safety>")
endif()
if(ORLOP_SANITIZE)
  add_compile_options(-fsanitize=${ORLOP_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=undefined)
  add_link_options(-fsanitize=${ORLOP_SANITIZE})
  add_compile_definitions(ORLOP_SANITIZED)
  if(ORLOP_SANITIZE MATCHES "thread")
    # Protobuf's headers give maps two more fields if they see GCC's macro, and the system's library does not have them.
    add_compile_options(-U__SANITIZE_THREAD__)
    add_compile_definitions(ORLOP_THREAD_SANITIZER)
  endif()
endif()
# To cache files that use a precompiled header, ccache needs pch_defines, time_macros and, for GCC, -fpch-preprocess. The other two let it
# cache files whose headers protoc has just written.
find_program(CCACHE ccache)
if(CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env
      CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime ${CCACHE})
  add_compile_options($<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>)
endif()

# orlop_target(<folder> <out>): sets <out> to the name of the folder's library: orlop_server_job for server/job.
function(orlop_target folder out)
  string(REPLACE "/" "_" target ${folder})
  set(${out} orlop_${target} PARENT_SCOPE)
endfunction()

# orlop_precompile(<target> <owner>): lets the target use the precompiled headers of cmake/pch.h, which the target <owner> compiles. There
# are two owners: orlop_proto for libraries and server_test for test programs, since programs have another compiler flag (-fPIE).
function(orlop_precompile target owner)
  if(target STREQUAL owner)
    target_precompile_headers(${target} PRIVATE ${PROJECT_SOURCE_DIR}/cmake/pch.h)
  else()
    target_precompile_headers(${target} REUSE_FROM ${owner})
  endif()
endfunction()

# orlop_generate_proto(<target>): has protoc generate messages and gRPC services from proto/orlop/v1/*.proto, and adds them to the target.
function(orlop_generate_proto target)
  file(GLOB protos CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/proto/orlop/v1/*.proto)
  find_program(GRPC_CPP_PLUGIN grpc_cpp_plugin REQUIRED)
  set(out ${PROJECT_BINARY_DIR}/generated)
  file(MAKE_DIRECTORY ${out})
  foreach(proto ${protos})
    get_filename_component(stem ${proto} NAME_WE)
    set(base ${out}/orlop/v1/${stem})
    add_custom_command(
      OUTPUT ${base}.pb.cc ${base}.pb.h ${base}.grpc.pb.cc ${base}.grpc.pb.h
      COMMAND protobuf::protoc -I ${PROJECT_SOURCE_DIR}/proto --cpp_out=${out} --grpc_out=${out}
              --plugin=protoc-gen-grpc=${GRPC_CPP_PLUGIN} ${proto}
      DEPENDS ${protos} VERBATIM)
    target_sources(${target} PRIVATE ${base}.pb.cc ${base}.grpc.pb.cc)
    list(APPEND generated ${base}.pb.h ${base}.grpc.pb.h)
    set_source_files_properties(${base}.pb.cc ${base}.grpc.pb.cc PROPERTIES
      SKIP_PRECOMPILE_HEADERS ON COMPILE_OPTIONS -w)
  endforeach()
  add_custom_target(orlop_generated DEPENDS ${generated})  # clang-tidy (make lint) needs the generated headers
  target_include_directories(${target} SYSTEM PUBLIC $<BUILD_INTERFACE:${out}>)
endfunction()

# orlop_library(<folder> <dependency>...): makes a static library of every .cc directly in the folder, except tests and main.cc. The folders
# proto and kernels get generated sources too; orlop_add_optimizers is in kernels/optimizers.cmake.
function(orlop_library folder)
  orlop_target(${folder} target)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/${folder}/*.cc)
  list(FILTER sources EXCLUDE REGEX "(_test|/main)\\.cc$")
  if(ORLOP_KERNELS_ONLY)  # the build has no BLAS
    list(FILTER sources EXCLUDE REGEX "kernels/(orthogonalize|tensor_pass).cc$")
  else()
    set_source_files_properties(${PROJECT_SOURCE_DIR}/kernels/orthogonalize.cc PROPERTIES
                                INCLUDE_DIRECTORIES ${OPENBLAS_INCLUDE})
  endif()
  add_library(${target} STATIC ${sources})
  string(REPLACE "orlop_" "" export_name ${target})
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX EXPORT_NAME ${export_name})
  target_include_directories(${target} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}>
                                              $<INSTALL_INTERFACE:include/orlop>)
  target_link_libraries(${target} PUBLIC ${ARGN} Threads::Threads)
  if(folder STREQUAL "proto")
    orlop_generate_proto(${target})
    orlop_precompile(${target} orlop_proto)
  elseif(folder STREQUAL "kernels")
    orlop_add_optimizers(${target} kernels/optimizer_unit.cc.in)
  elseif(folder STREQUAL "kernels/cuda")
    orlop_add_optimizers(${target} kernels/cuda/optimizer_unit.cu.in)
    target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${ORLOP_CUDA_FLAGS}>")
  # server/step is pure and does not link gRPC, whose headers are in cmake/pch.h.
  elseif(folder MATCHES "^(server|client|cli|bench)" AND NOT folder STREQUAL "server/step")
    orlop_precompile(${target} orlop_proto)
  endif()
endfunction()

# orlop_binary(<name> <folder>/main <dependency>...): makes the program <name> from <folder>/main.cc.
function(orlop_binary name main)
  add_executable(${name} ${main}.cc)
  target_link_libraries(${name} PRIVATE ${ARGN})
endfunction()

# orlop_test(<folder> <dependency>...): makes one test program of every *_test.cc in the folder and below it. The subfolders kernels/cuda
# and server/step are left out, since they have programs of their own.
function(orlop_test folder)
  string(REPLACE "/" "_" name ${folder})
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/${folder}/*_test.cc)
  foreach(own kernels/cuda server/step)
    if(NOT folder STREQUAL own)
      list(FILTER sources EXCLUDE REGEX "/${own}/")
    endif()
  endforeach()
  if(ORLOP_KERNELS_ONLY)
    list(FILTER sources EXCLUDE REGEX "kernels/tensor_pass_test.cc$")
  endif()
  if(NOT TARGET orlop_kernels_cuda)  # device_test.cc links the CUDA library
    list(FILTER sources EXCLUDE REGEX "kernels/cuda/device_test.cc$")
  endif()
  if(folder STREQUAL "tests")  # the simulator and other code that only these tests use
    file(GLOB helpers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/tests/*.cc)
    list(FILTER helpers EXCLUDE REGEX "(_main)\\.cc$")
    list(APPEND sources ${helpers})
    list(REMOVE_DUPLICATES sources)
  endif()
  add_executable(${name}_test ${sources})
  target_include_directories(${name}_test PRIVATE ${PROJECT_SOURCE_DIR})
  target_compile_definitions(${name}_test PRIVATE ORLOP_BIN_DIR="${CMAKE_RUNTIME_OUTPUT_DIRECTORY}")
  target_link_libraries(${name}_test PRIVATE ${ARGN} GTest::gmock GTest::gtest_main)
  if(folder MATCHES "^(server|client|tests)$")
    orlop_precompile(${name}_test server_test)
  endif()
  include(GoogleTest)
  gtest_discover_tests(${name}_test DISCOVERY_MODE PRE_TEST PROPERTIES LABELS ${name} TIMEOUT 600)
endfunction()
