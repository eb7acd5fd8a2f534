// The `orlop` command: parses the command line and runs one subcommand.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>

#include "absl/strings/str_cat.h"
#include "bench/bench.h"
#include "cli/commands.h"
#include "cli/context.h"
#include "cli/print/print.h"

namespace orlop::cli {
namespace {

constexpr char kFooter[] =
    "\nThe server is --server, else the environment variable ORLOP_SERVER, else 127.0.0.1:7070.\n"
    "Start one with `orlopd --data-dir DIRECTORY`, then try `orlop servers`.";

// The values of the subcommands' options.
struct Arguments {
  std::string job, tensor, path, name, dtype, shell;
  int64_t to_step = 0;
  double timeout_seconds = 5;
  bench::Options bench;
};

using Run = std::function<int()>;

void AddViews(CLI::App* app, const Context& context, Arguments* args, Run* run) {
  app->add_subcommand("servers", "the servers of the cluster")->callback([&, run] {
    *run = [&] { return Servers(context); };
  });
  app->add_subcommand("status", "bytes of every server by tier, job and slot")->callback([&, run] {
    *run = [&] { return Status(context); };
  });
  app->add_subcommand("jobs", "the jobs of the cluster")->callback([&, run] {
    *run = [&] { return Jobs(context); };
  });
  CLI::App* tensors = app->add_subcommand("tensors", "the tensors of a job");
  tensors->add_option("JOB", args->job, "job; not needed when there is only one");
  tensors->add_option("--name", args->name, "only names that contain this");
  tensors->callback(
      [&, args, run] { *run = [&, args] { return Tensors(context, args->job, args->name); }; });
  CLI::App* describe = app->add_subcommand("describe", "where every shard of a tensor is, and why");
  describe->add_option("TENSOR", args->tensor, "name of the tensor")->required();
  describe->add_option("--job", args->job, "job; not needed when there is only one");
  describe->callback(
      [&, args, run] { *run = [&, args] { return Describe(context, args->job, args->tensor); }; });
}

void AddActions(CLI::App* app, const Context& context, Arguments* args, Run* run) {
  CLI::App* exports =
      app->add_subcommand("export", "write a job's weights and buffers as safetensors");
  exports->add_option("JOB", args->job, "job")->required();
  exports->add_option("--to", args->path, "file to write")->required();
  exports
      ->add_option("--dtype", args->dtype,
                   "type of the parameters: fp32 or bf16; by default the job's own")
      ->check(CLI::IsMember({"fp32", "bf16"}));
  exports->callback([&, args, run] {
    *run = [&, args] { return Export(context, args->job, args->path, args->dtype); };
  });
  CLI::App* imports =
      app->add_subcommand("import", "load weights from a safetensors file as a new step");
  imports->add_option("FILE", args->path, "file to read")->required();
  imports->add_option("--job", args->job, "job to load into")->required();
  imports->callback(
      [&, args, run] { *run = [&, args] { return Import(context, args->job, args->path); }; });
  CLI::App* flush = app->add_subcommand("flush", "write a running job to disk on all its servers");
  flush->add_option("JOB", args->job, "job")->required();
  flush->callback([&, args, run] { *run = [&, args] { return Flush(context, args->job); }; });
  CLI::App* rollback =
      app->add_subcommand("rollback", "accept the loss of steps after memory was lost");
  rollback->add_option("JOB", args->job, "job")->required();
  rollback->add_option("--to-step", args->to_step, "the step offered (see `orlop jobs`)")
      ->required();
  rollback->callback(
      [&, args, run] { *run = [&, args] { return Rollback(context, args->job, args->to_step); }; });
  CLI::App* remove = app->add_subcommand("delete", "delete a job and all its state");
  remove->add_option("JOB", args->job, "job")->required();
  remove->callback([&, args, run] { *run = [&, args] { return Delete(context, args->job); }; });
}

void AddOwn(CLI::App* app, const Context& context, Arguments* args, Run* run) {
  CLI::App* bench = app->add_subcommand("bench", "measure this machine with private servers");
  bench->add_option("NAME", args->bench.name, "wire, step, kernels or flush")
      ->required()
      ->check(CLI::IsMember({"wire", "step", "kernels", "flush"}));
  bench->add_option("--repetitions", args->bench.repetitions, "rounds measured")
      ->check(CLI::Range(3, 1000));
  bench
      ->add_option("--mebibytes", args->bench.mebibytes,
                   "payload of a round of `wire` (128); state of the job in `flush` (256)")
      ->check(CLI::Range(8, 16384));
  bench
      ->add_option("--mebiparameters", args->bench.mebiparameters,
                   "size of the tensor in `kernels`")
      ->check(CLI::Range(1, 256));
  bench
      ->add_option("--data-dir", args->bench.data_dir,
                   "directory for the servers' data; by default that for temporary files")
      ->check(CLI::ExistingDirectory);
  bench->callback([&, args, run] {
    *run = [&, args] {
      args->bench.json = context.json;
      return bench::RunNamed(args->bench);
    };
  });
  CLI::App* peer = app->add_subcommand("bench-peer", "the other end of `bench`")->group("");
  peer->callback([run] { *run = [] { return bench::ServePeer(); }; });
  CLI::App* completion = app->add_subcommand("completion", "print a completion script for a shell");
  completion->add_option("SHELL", args->shell, "bash, zsh or fish")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh", "fish"}));
  completion->callback([args, run] { *run = [args] { return Completion(args->shell); }; });
}

int Main(int argc, char** argv) {
  Context context;
  Arguments args;
  Run run;
  context.terminal = isatty(STDOUT_FILENO) == 1;
  if (const char* server = std::getenv("ORLOP_SERVER"); server != nullptr && *server != '\0')
    context.options.server = server;
  CLI::App app("Look into Orlop state servers and the jobs they hold.", "orlop");
  app.set_version_flag("--version", std::string("orlop ") + ORLOP_VERSION);
  app.footer(kFooter);
  app.fallthrough();
  app.failure_message([](const CLI::App* root, const CLI::Error& error) {
    const auto chosen = root->get_subcommands();
    return absl::StrCat("orlop: ", error.what(), "\n`orlop ",
                        chosen.empty() ? "" : chosen.back()->get_name() + " ",
                        "--help` lists commands and options.\n");
  });
  app.add_option("--server", context.options.server, "any server: HOST:PORT or unix:/PATH");
  app.add_flag("--json", context.json, "print JSON, for programs");
  app.add_option("--tls-cert", context.options.tls.certificate,
                 "PEM certificate of this client (mutual TLS)");
  app.add_option("--tls-key", context.options.tls.key, "its private key");
  app.add_option("--tls-ca", context.options.tls.authority, "certificate that signed the servers'");
  app.add_option("--timeout", args.timeout_seconds, "seconds to wait for a server")
      ->check(CLI::Range(0.1, 3600.0))
      ->capture_default_str();
  AddViews(&app, context, &args, &run);
  AddActions(&app, context, &args, &run);
  AddOwn(&app, context, &args, &run);
  if (argc <= 1) {
    Print(app.help());
    return kUsage;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kOk : kUsage;
  }
  context.options.connect_timeout =
      client::Milliseconds(static_cast<int64_t>(args.timeout_seconds * 1000));
  if (!run) return Print(app.help()), kUsage;
  return run();
}

}  // namespace
}  // namespace orlop::cli

int main(int argc, char** argv) { return orlop::cli::Main(argc, argv); }
