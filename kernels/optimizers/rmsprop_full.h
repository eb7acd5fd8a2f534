// torch.optim.RMSprop with momentum, centered, or both; "rmsprop" is the form with neither.
//   g = g + weight_decay * p; s = lerp(s, g * g, 1 - alpha); a = lerp(a, g, 1 - alpha)
//   b = momentum * b + g / (sqrt(centered ? s - a * a : s) + eps);  p = p - lr * b
// If a is quantised, s - a * a may be negative; it then counts as 0. If momentum is 0, b is left as
// it is and not used; if centered is 0, so is a.
struct RmspropFull {
  static constexpr HyperParameter kHyperParameters[] = {
      Lr(1e-2),       Beta("alpha", 0.99),     Eps(1e-8),
      WeightDecay(0), Positive("momentum", 0), Flag("centered")};
  static constexpr StateSpec kStates[] = {{"square_avg", CodeBook::kUnsigned, "alpha"},
                                          {"momentum_buffer", CodeBook::kSigned, "momentum"},
                                          {"grad_avg", CodeBook::kSigned, "alpha"}};

  struct Scalars {
    float lr, alpha, one_minus_alpha, eps, weight_decay, momentum;
    float centered;  // 1 or 0
  };
  static Scalars Prepare(const double* h, double) {
    return {Fp32(h[0]), Fp32(h[1]), Fp32(1 - h[1]),         Fp32(h[2]),
            Fp32(h[3]), Fp32(h[4]), h[5] != 0 ? 1.0f : 0.0f};
  }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : lr(A::Set(s.lr)),
          average(s.alpha, s.one_minus_alpha),
          eps(A::Set(s.eps)),
          weight_decay(A::Set(s.weight_decay)),
          momentum(A::Set(s.momentum)),
          has_momentum(s.momentum != 0),
          centered(s.centered != 0) {}
    ORLOP_RULE F operator()(F gradient, F p, F* state) const {
      const F g = A::MulAdd(weight_decay, p, gradient);
      F s = state[0] = average(state[0], A::Mul(g, g));
      if (centered) {
        const F a = state[2] = average(state[2], g);
        s = A::Max(A::NegMulAdd(a, a, s), A::Set(0));
      }
      F update = A::Div(g, A::Add(A::Sqrt(s), eps));
      if (has_momentum) update = state[1] = A::MulAdd(momentum, state[1], update);
      return A::NegMulAdd(lr, update, p);
    }
    F lr;
    Lerp<A> average;
    F eps, weight_decay, momentum;
    bool has_momentum, centered;
  };
};
