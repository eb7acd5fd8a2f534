// completion: scripts for shells. They ask the server for job names when a command takes one.
#include <cstdio>
#include <string>

#include "cli/commands.h"
#include "cli/print/print.h"

namespace orlop::cli {
namespace {

constexpr char kBash[] =
    R"sh(# orlop completion for bash: eval "$(orlop completion bash)"
_orlop() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}
  case $previous in
    tensors|export|flush|rollback|delete|--job)
      COMPREPLY=($(compgen -W "$(orlop jobs --json 2>/dev/null | sed -n 's/^    "job": "\(.*\)",$/\1/p')" -- "$current")); return ;;
    bench) COMPREPLY=($(compgen -W "wire step kernels flush" -- "$current")); return ;;
    completion) COMPREPLY=($(compgen -W "bash zsh fish" -- "$current")); return ;;
    --dtype) COMPREPLY=($(compgen -W "fp32 bf16" -- "$current")); return ;;
    --to|import|--data-dir|--tls-cert|--tls-key|--tls-ca) COMPREPLY=($(compgen -f -- "$current")); return ;;
  esac
  case $current in
    -*) COMPREPLY=($(compgen -W "--server --json --tls-cert --tls-key --tls-ca --timeout --help --version" -- "$current")) ;;
    *) COMPREPLY=($(compgen -W "servers tensors describe status jobs export import flush rollback delete bench completion" -- "$current")) ;;
  esac
}
complete -F _orlop orlop
)sh";

constexpr char kZshHead[] =
    "# orlop completion for zsh: eval \"$(orlop completion zsh)\"\nautoload -U +X bashcompinit && "
    "bashcompinit\n";

constexpr char kFish[] = R"sh(# orlop completion for fish: orlop completion fish | source
set -l commands servers tensors describe status jobs export import flush rollback delete bench completion
complete -c orlop -f
complete -c orlop -n "not __fish_seen_subcommand_from $commands" -a "$commands"
complete -c orlop -n "__fish_seen_subcommand_from tensors export flush rollback delete" -a "(orlop jobs --json 2>/dev/null | string match -rg '^    \"job\": \"(.*)\",\$')"
complete -c orlop -n "__fish_seen_subcommand_from bench" -a "wire step kernels flush"
complete -c orlop -n "__fish_seen_subcommand_from completion" -a "bash zsh fish"
complete -c orlop -n "__fish_seen_subcommand_from import" -F
complete -c orlop -l server -r -d "HOST:PORT or unix:/PATH"
complete -c orlop -l json -d "for programs"
complete -c orlop -l tls-cert -r -F
complete -c orlop -l tls-key -r -F
complete -c orlop -l tls-ca -r -F
complete -c orlop -l data-dir -r -F
)sh";

}  // namespace

int Completion(const std::string& shell) {
  if (shell == "fish") {
    Print(kFish);
    return kOk;
  }
  if (shell == "zsh") Print(kZshHead);
  Print(kBash);
  return kOk;
}

}  // namespace orlop::cli
