// Not an optimizer: the worker steps, and the servers store the weights that it pushes.
//   p = g
struct Store {
  static constexpr bool kTakesWeights = true;
  static constexpr std::array<HyperParameter, 0> kHyperParameters{};
  static constexpr std::array<StateSpec, 0> kStates{};

  struct Scalars {};
  static Scalars Prepare(const double*, double) { return {}; }
  static bool KeepsState(const Scalars&) { return false; }

  template <class A>
  struct Rule {
    using F = typename A::F;
    ORLOP_RULE explicit Rule(const Scalars&) {}
    ORLOP_RULE F operator()(F g, F, F*) const { return g; }
  };
};
