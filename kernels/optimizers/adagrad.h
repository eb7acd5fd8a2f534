// torch.optim.Adagrad: Duchi et al., 2011.
//   g = g + weight_decay * p; sum = sum + g * g
//   p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(sum) + eps)
// The sum starts at initial_accumulator_value, which the first step adds.
struct Adagrad {
  static constexpr HyperParameter kHyperParameters[] = {
      Lr(1e-2), Positive("lr_decay", 0), WeightDecay(0), Positive("initial_accumulator_value", 0),
      Eps(1e-10)};
  static constexpr StateSpec kStates[] = {{"sum", CodeBook::kUnsigned, nullptr}};

  struct Scalars {
    float step_size, weight_decay, eps;
    float initial;  // initial_accumulator_value in the first step, else 0
  };
  static Scalars Prepare(const double* h, double t) {
    return {Fp32(h[0] / (1 + (t - 1) * h[1])), Fp32(h[2]), Fp32(h[4]), t == 1 ? Fp32(h[3]) : 0.0f};
  }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : step_size(A::Set(s.step_size)),
          weight_decay(A::Set(s.weight_decay)),
          eps(A::Set(s.eps)),
          initial(A::Set(s.initial)) {}
    ORLOP_RULE F operator()(F gradient, F p, F* state) const {
      const F g = A::MulAdd(weight_decay, p, gradient);
      const F sum = state[0] = A::MulAdd(g, g, A::Add(state[0], initial));
      return A::NegMulAdd(step_size, A::Div(g, A::Add(A::Sqrt(sum), eps)), p);
    }
    F step_size, weight_decay, eps, initial;
  };
};
