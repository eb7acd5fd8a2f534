// Lion: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, alg. 2. Decoupled decay.
//   p = p - lr * (sign(beta1 * m + (1 - beta1) * g) + weight_decay * p)
//   m = lerp(m, g, 1 - beta2)
struct Lion {
  static constexpr HyperParameter kHyperParameters[] = {Lr(1e-4), Beta("beta1", 0.9),
                                                        Beta("beta2", 0.99), WeightDecay(0)};
  static constexpr StateSpec kStates[] = {{"exp_avg", CodeBook::kSigned, "beta2"}};

  struct Scalars {
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float lr, decay;  // decay: lr * weight_decay
  };
  static Scalars Prepare(const double* h, double) {
    return {Fp32(h[1]), Fp32(1 - h[1]), Fp32(h[2]), Fp32(1 - h[2]), Fp32(h[0]), Fp32(h[0] * h[3])};
  }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars& s)
        : beta1(A::Set(s.beta1)),
          one_minus_beta1(A::Set(s.one_minus_beta1)),
          exp_avg(s.beta2, s.one_minus_beta2),
          lr(A::Set(s.lr)),
          decay(A::Set(s.decay)) {}
    ORLOP_RULE F operator()(F g, F p, F* state) const {
      const F direction = A::Sign(A::MulAdd(beta1, state[0], A::Mul(one_minus_beta1, g)));
      state[0] = exp_avg(state[0], g);
      return A::Sub(p, A::MulAdd(decay, p, A::Mul(lr, direction)));
    }
    F beta1, one_minus_beta1;
    Lerp<A> exp_avg;
    F lr, decay;
  };
};
