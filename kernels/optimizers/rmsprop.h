// torch.optim.RMSprop (Tieleman and Hinton, 2012), neither centered nor with momentum.
//   g = g + weight_decay * p; s = lerp(s, g * g, 1 - alpha);  p = p - lr * g / (sqrt(s) + eps)
struct Rmsprop {
  static constexpr HyperParameter kHyperParameters[] = {Lr(1e-2), Beta("alpha", 0.99), Eps(1e-8),
                                                        WeightDecay(0)};
  static constexpr StateSpec kStates[] = {{"square_avg", CodeBook::kUnsigned, "alpha"}};

  struct Scalars {
    float lr, alpha, one_minus_alpha, eps, weight_decay;
  };
  static Scalars Prepare(const double* h, double) {
    return {Fp32(h[0]), Fp32(h[1]), Fp32(1 - h[1]), Fp32(h[2]), Fp32(h[3])};
  }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : lr(A::Set(s.lr)),
          square_avg(s.alpha, s.one_minus_alpha),
          eps(A::Set(s.eps)),
          weight_decay(A::Set(s.weight_decay)) {}
    ORLOP_RULE F operator()(F gradient, F p, F* state) const {
      const F g = A::MulAdd(weight_decay, p, gradient);
      const F s = state[0] = square_avg(state[0], A::Mul(g, g));
      return A::NegMulAdd(lr, A::Div(g, A::Add(A::Sqrt(s), eps)), p);
    }
    F lr;
    Lerp<A> square_avg;
    F eps, weight_decay;
  };
};
