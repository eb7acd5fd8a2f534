// torch.optim.Muon, for matrices: Jordan et al., 2024.
//   m = lerp(m, g, 1 - momentum); u = nesterov ? lerp(g, m, momentum) : m; o = NewtonSchulz(u)
//   p = p - (lr * weight_decay * p + lr * adjust * o)
//   adjust = sqrt(max(1, rows / columns)) for adjust_lr 0, "original";
//            0.2 * sqrt(max(rows, columns)) for adjust_lr 1, "match_rms_adamw"
// The momentum's bits are the same on every machine. A BLAS library computes o, whose bits are the
// same only on machines of one type.
struct Muon {
  static constexpr Scope kScope = Scope::kMatrix;
  static constexpr HyperParameter kHyperParameters[] = {Lr(1e-3),
                                                        WeightDecay(0.1),
                                                        {"momentum", 0.95, 0, 1},
                                                        {"nesterov", 1, 0, 1, true, true},
                                                        AnySign("ns_a", 3.4445),
                                                        AnySign("ns_b", -4.7750),
                                                        AnySign("ns_c", 2.0315),
                                                        Eps(1e-7),
                                                        {"ns_steps", 5, 0, 99, true, true},
                                                        {"adjust_lr", 0, 0, 1, true, true}};
  static constexpr StateSpec kStates[] = {{"momentum_buffer", CodeBook::kSigned, "momentum"}};

  struct Scalars {
    float momentum, one_minus_momentum, nesterov;
    float decay;      // lr * weight_decay
    float step_size;  // lr, later multiplied by `adjust`
    float adjust_lr;
    NewtonSchulz iteration;
  };
  static Scalars Prepare(const double* h, double) {
    return {Fp32(h[2]),
            Fp32(1 - h[2]),
            Fp32(h[3]),
            Fp32(h[0] * h[1]),
            Fp32(h[0]),
            Fp32(h[9]),
            {Fp32(h[4]), Fp32(h[5]), Fp32(h[6]), Fp32(h[7]), Fp32(h[8])}};
  }
  static void Begin(const MatrixShape& shape, Scalars* s) {
    const auto rows = static_cast<double>(shape.rows), columns = static_cast<double>(shape.columns);
    const double adjust = s->adjust_lr == 0 ? std::sqrt(std::max(1.0, rows / columns))
                                            : 0.2 * std::sqrt(std::max(rows, columns));
    s->step_size = FiniteFp32(s->step_size * adjust);
  }
  static NewtonSchulz Iteration(const Scalars& s) { return s.iteration; }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : average(s.momentum, s.one_minus_momentum),
          ahead(s.one_minus_momentum, s.momentum),
          nesterov(s.nesterov != 0),
          decay(A::Set(s.decay)),
          step_size(A::Set(s.step_size)) {}
    ORLOP_RULE void Measure(F g, F, F* state, F* out) const {
      const F m = average(state[0], g);
      out[0] = nesterov ? ahead(g, m) : m;
      out[1] = A::Set(0);
    }
    ORLOP_RULE F operator()(F g, F p, F* state) const {
      state[0] = average(state[0], g);
      return A::Sub(p, A::MulAdd(decay, p, A::Mul(step_size, state[1])));
    }
    Lerp<A> average, ahead;
    bool nesterov;
    F decay, step_size;
  };
};
