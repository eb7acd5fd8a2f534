// torch.optim.SGD. Without momentum the momentum_buffer is neither read nor written.
//   g = g + weight_decay * p
//   b = first step ? g : momentum * b + (1 - dampening) * g
//   p = p - lr * (momentum == 0 ? g : nesterov ? g + momentum * b : b)
struct Sgd {
  static constexpr HyperParameter kHyperParameters[] = {
      Lr(1e-3), Positive("momentum", 0), AnySign("dampening", 0), WeightDecay(0), Flag("nesterov")};
  static constexpr StateSpec kStates[] = {{"momentum_buffer", CodeBook::kSigned, "momentum"}};

  struct Scalars {
    float lr, momentum, one_minus_dampening, weight_decay;
    float nesterov, first_step;  // 1 or 0
  };
  static absl::Status Validate(const double* h) {
    if (h[4] == 0 || (h[1] > 0 && h[2] == 0)) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("nesterov needs momentum > 0 and dampening 0, but momentum is ", h[1],
                     " and dampening is ", h[2]));
  }
  static Scalars Prepare(const double* h, double t) {
    return {Fp32(h[0]),          Fp32(h[1]), Fp32(1 - h[2]), Fp32(h[3]), h[4] != 0 ? 1.0f : 0.0f,
            t == 1 ? 1.0f : 0.0f};
  }
  static bool KeepsState(const Scalars& s) { return s.momentum != 0; }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : lr(A::Set(s.lr)),
          momentum(A::Set(s.momentum)),
          one_minus_dampening(A::Set(s.one_minus_dampening)),
          weight_decay(A::Set(s.weight_decay)),
          keeps_state(s.momentum != 0),
          nesterov(s.nesterov != 0),
          first_step(s.first_step != 0) {}
    ORLOP_RULE F operator()(F gradient, F p, F* state) const {
      const F g = A::MulAdd(weight_decay, p, gradient);
      F direction = g;
      if (keeps_state) {
        const F b = first_step ? g : A::MulAdd(momentum, state[0], A::Mul(one_minus_dampening, g));
        direction = nesterov ? A::MulAdd(momentum, b, g) : b;
        state[0] = b;
      }
      return A::NegMulAdd(lr, direction, p);
    }
    F lr, momentum, one_minus_dampening, weight_decay;
    bool keeps_state, nesterov, first_step;
  };
};
